from dataclasses import replace

import pytest
import tones
import torch

import gq_triton as gq
from gq_triton.speech.metrics import wer
from gq_triton.training import SpeechSet
from gq_triton.training.evaluation import evaluate, loss_per_token
from gq_triton.training.objective import transducer_loss


class Parrot:
    """A recognizer that answers by the number of frames, whatever it hears."""

    stage = "float"

    def __init__(self, answers):
        self.answers = answers

    def recognize(self, features, lengths, *, beam_width):
        self.beam_width = beam_width
        return [self.answers[int(length)] for length in lengths]


@pytest.fixture(scope="module")
def speech():
    spoken = tones.utterances(9)
    made = tones.recognizer(spoken)
    return SpeechSet(spoken, made.front_end, made.tokenizer, progress=False)


def test_errors_are_counted_in_the_order_of_the_set(speech):
    """One answer is wrong in its first word; answers come in order of length, not in the set's."""
    frames = [len(speech[((index, 1.0),)][0]) for index in range(len(speech))]
    shortest = frames.index(min(frames))
    answers = {}
    for length, text in zip(frames, speech.texts, strict=True):
        answers.setdefault(length, text)
    expected = [answers[length] for length in frames]
    answers[frames[shortest]] = "wrong " + answers[frames[shortest]].partition(" ")[2]
    parrot = Parrot(answers)
    result = evaluate(parrot, speech, batch_size=4, beam_width=2, progress=False)
    assert [a == b for a, b in zip(result.hypotheses, expected, strict=True)] == [n != frames[shortest] for n in frames]
    assert result.wer == wer(speech.texts, result.hypotheses) > 0
    assert result.words == sum(len(text.split()) for text in speech.texts)
    assert result.interval[0] <= result.wer <= result.interval[1]
    assert result.audio_seconds == pytest.approx(sum(speech.durations))
    assert parrot.beam_width == 2


def test_silence_for_an_answer_is_an_error_for_every_word(speech):
    result = evaluate(Parrot(dict.fromkeys(range(1000), "")), speech, progress=False)
    assert (result.wer, result.interval) == (1.0, (1.0, 1.0))
    assert "hypotheses" not in result.to_dict()


def test_the_interval_of_a_single_speaker_is_drawn_over_utterances(speech):
    alone = [replace(utterance, speaker="one") for utterance in speech.utterances]
    made = tones.recognizer(alone)
    right = {len(speech[((index, 1.0),)][0]): text for index, text in enumerate(speech.texts)}
    longest = max(right)
    single = SpeechSet(alone, made.front_end, made.tokenizer, progress=False)
    result = evaluate(Parrot({**right, longest: ""}), single, progress=False)
    assert result.interval[0] < result.wer < result.interval[1]


def test_a_prepared_recognizer_is_measured_packed(speech):
    prepared = tones.recognizer(speech.utterances).prepare(gq.GQConfig(bits=2, activations="int8")).eval()
    packed = prepared.packed_copy()
    assert evaluate(prepared, speech, progress=False).hypotheses == evaluate(packed, speech, progress=False).hypotheses
    assert prepared.stage == "qat"
    assert all(torch.isfinite(parameter).all() for parameter in prepared.parameters())


def test_the_loss_is_that_of_all_tokens_however_they_are_batched(speech):
    recognizer = tones.recognizer(speech.utterances)
    losses = [loss_per_token(recognizer, speech, batch_size=size) for size in (1, 4, 9)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    alone, tokens = 0.0, 0
    for index in range(len(speech)):
        features, targets = speech[((index, 1.0),)]
        lattice = recognizer.model(features[None], torch.tensor([len(features)]), targets[None])
        labels = targets[None], torch.tensor([len(targets)])
        tokens += len(targets)
        alone += transducer_loss(recognizer.model.joint, lattice, *labels).item()
    assert losses[0] == pytest.approx(alone / tokens, rel=1e-4)


def test_the_loss_of_packed_weights_is_their_own(speech):
    recognizer = tones.recognizer(speech.utterances)
    packed = recognizer.packed_copy(gq.GQConfig(bits=1))
    assert loss_per_token(packed, speech) != pytest.approx(loss_per_token(recognizer, speech), rel=1e-3)


def test_the_loss_of_a_bifocal_recognizer_is_of_both_encoders(speech):
    sizes = {"small_encoder_layers": 2, "small_encoder_hidden": 8}
    recognizer = tones.recognizer(speech.utterances, **sizes)
    losses = [loss_per_token(recognizer, speech)]
    for encoder in (recognizer.model.encoder.small, recognizer.model.encoder.large):
        torch.nn.init.zeros_(encoder.layers[0].weight_ih_l0)
        losses.append(loss_per_token(recognizer, speech))
    assert len(set(losses)) == 3
