import json
from dataclasses import replace

import pytest
import tones
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gq_triton as gq
from gq_triton.models import RNNT, ConformerConfig, model_of
from gq_triton.speech.audio import save_audio
from gq_triton.speech.features import LogMel
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.tokens import train_tokenizer
from gq_triton.training import SpeechSet, TrainConfig, Trainer

MIXED = {"encoder.layers.1": gq.GQConfig(bits=2), "joint.output": None, "*": gq.GQConfig(bits=5, codebook="int8")}


@pytest.fixture(scope="module")
def spoken():
    return tones.utterances(24)


@pytest.fixture(scope="module")
def trained(spoken, tmp_path_factory) -> Recognizer:
    """A float recognizer that understands tones."""
    recognizer = tones.recognizer(spoken, dropout=0.0)
    speech = SpeechSet(spoken, recognizer.front_end, recognizer.tokenizer, progress=False)
    config = TrainConfig(epochs=40, batch_size=6, learning_rate=1e-2, ctc_weight=0.3, freq_masks=0, time_masks=0)
    Trainer(recognizer.model, speech, config, tmp_path_factory.mktemp("run"), progress=False).run()
    return recognizer.cpu().eval()


@pytest.fixture(params=["float", "qat", "packed"])
def staged(request, trained, spoken) -> Recognizer:
    if request.param == "float":
        return trained
    prepared = trained.packed_copy(MIXED) if request.param == "packed" else tones.recognizer(spoken).prepare(MIXED)
    return prepared.eval()


def test_a_trained_recognizer_understands(trained, spoken):
    heard = [trained.transcribe(utterance.load()) for utterance in spoken[:6]]
    assert heard == [utterance.text for utterance in spoken[:6]]


def test_a_file_and_its_waveform_give_one_text(trained, spoken, tmp_path):
    save_audio(tmp_path / "a.flac", spoken[1].load())
    assert trained.transcribe(tmp_path / "a.flac") == trained.transcribe(str(tmp_path / "a.flac")) == spoken[1].text


def test_beam_search_finds_the_text_too(trained, spoken):
    assert trained.transcribe(spoken[0].load(), beam_width=3) == spoken[0].text


def test_a_batch_is_recognized_as_its_utterances_are(trained, spoken):
    speech = SpeechSet(spoken[:5], trained.front_end, trained.tokenizer, progress=False)
    ((order, batch),) = speech.in_order(5)
    texts = trained.recognize(batch.features, batch.feature_lengths)
    assert texts == [trained.transcribe(spoken[index].load()) for index in order]


@pytest.mark.parametrize("samples", [0, 10, 399, 400, 1000, 1500])
def test_audio_shorter_than_an_encoder_frame_is_empty(trained, samples):
    assert trained.transcribe(torch.zeros(samples)) == ""


@pytest.mark.parametrize("beam_width", [1, 2])
def test_a_batch_of_short_audio_is_as_empty(trained, beam_width):
    features, lengths = trained.front_end(torch.zeros(2, 1000), torch.tensor([1000, 0]))
    assert trained.recognize(features, lengths, beam_width=beam_width) == ["", ""]


def test_parts_that_do_not_fit_are_refused(trained):
    with pytest.raises(ValueError, match="front_end gives 40 values a frame, model takes 80"):
        Recognizer(LogMel(n_mels=40), trained.tokenizer, trained.model)
    with pytest.raises(ValueError, match="tokenizer has 3 ids, model emits 6"):
        Recognizer(trained.front_end, train_tokenizer("word", ["do"]), trained.model)


@pytest.mark.filterwarnings("ignore:these patterns match no layer")
@pytest.mark.parametrize("patterns", [{"joint.outptu": gq.GQConfig(bits=4)}, {"*": None}])
def test_quantizing_no_layer_is_refused(spoken, patterns):
    recognizer = tones.recognizer(spoken)
    with pytest.raises(ValueError, match="quantizes no layer"):
        recognizer.prepare(patterns)
    assert recognizer.stage == "float"


def test_every_stage_is_saved_and_loaded(staged, spoken, tmp_path):
    staged.save(tmp_path / "model.safetensors")
    loaded = Recognizer.load(tmp_path / "model.safetensors")
    assert loaded.stage == staged.stage
    assert loaded.quantization == staged.quantization
    assert not loaded.training
    assert loaded.state_dict().keys() == staged.state_dict().keys()
    for name, tensor in staged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.transcribe(spoken[0].load()) == staged.transcribe(spoken[0].load())


@pytest.mark.parametrize("stage", ["float", "qat", "packed"])
def test_a_bifocal_recognizer_is_saved_and_loaded(stage, spoken, tmp_path):
    recognizer = tones.recognizer(spoken, small_encoder_layers=2, small_encoder_hidden=8)
    if stage != "float":
        recognizer.prepare({"encoder.small.*": gq.GQConfig(bits=4), "*": gq.GQConfig(bits=5)}).eval()
    if stage == "packed":
        recognizer.convert()
    recognizer.save(tmp_path / "m")
    loaded = Recognizer.load(tmp_path / "m")
    features, lengths, switch = torch.randn(2, 40, 80), torch.tensor([40, 40]), torch.tensor([16, 25])
    with torch.no_grad():
        expected, found = (
            model(features, lengths, switch)[0] for model in (recognizer.model.encoder, loaded.model.encoder)
        )
    assert torch.equal(found, expected)
    assert loaded.model.config == recognizer.model.config and loaded.stage == stage


@pytest.mark.parametrize("predictor_layers", [1, 0], ids=["transducer", "CTC"])
@pytest.mark.parametrize("stage", ["float", "qat", "packed"])
def test_a_conformer_recognizer_is_saved_and_loaded(stage, predictor_layers, spoken, tmp_path):
    made = tones.recognizer(spoken)
    sizes = dict(encoder_layers=2, predictor_layers=predictor_layers)
    config = ConformerConfig.preset("tiny", made.tokenizer.vocab_size, **sizes)
    recognizer = Recognizer(made.front_end, made.tokenizer, model_of(config)).eval()
    if stage != "float":
        recognizer.prepare({"encoder.blocks.0.*": gq.GQConfig(bits=2), "*": gq.GQConfig(bits=5)}).eval()
    if stage == "packed":
        recognizer.convert()
    recognizer.save(tmp_path / "m")
    loaded = Recognizer.load(tmp_path / "m")
    features, lengths = torch.randn(2, 60, 80), torch.tensor([60, 40])
    with torch.no_grad():
        expected, found = (model(features, lengths)[0] for model in (recognizer.model.encoder, loaded.model.encoder))
    assert torch.equal(found, expected)
    assert loaded.model.config == config and loaded.stage == stage
    assert loaded.transcribe(spoken[0].load()) == recognizer.transcribe(spoken[0].load())


@pytest.mark.parametrize("kind", ["char", "subword"])
def test_tokenizers_travel_in_the_file(kind, spoken, tmp_path):
    tokenizer = train_tokenizer(kind, [utterance.text for utterance in spoken], 16)
    model = RNNT(replace(tones.recognizer(spoken).model.config, vocab_size=tokenizer.vocab_size))
    recognizer = Recognizer(LogMel(adapt_frames=50).fit(u.load() for u in spoken), tokenizer, model).eval()
    recognizer.prepare(gq.GQConfig(bits=3)).convert().save(tmp_path / "m")
    loaded = Recognizer.load(tmp_path / "m")
    assert loaded.tokenizer.decode(tokenizer.encode("mi so")) == "mi so"
    assert loaded.front_end.to_dict() == recognizer.front_end.to_dict()
    assert loaded.transcribe(spoken[0].load()) == recognizer.transcribe(spoken[0].load())


def test_a_packed_copy_leaves_the_original_alone(trained):
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    copy = trained.packed_copy({"*": gq.GQConfig(bits=2)})
    assert (copy.stage, trained.stage, trained.quantization) == ("packed", "float", None)
    assert trained.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert gq.report(copy.model).bytes < gq.report(trained.model).bytes / 4


def test_the_packed_copy_of_a_prepared_recognizer_computes_what_it_computes(spoken):
    prepared = tones.recognizer(spoken, dropout=0.0).prepare(MIXED).eval()
    speech = SpeechSet(spoken[:4], prepared.front_end, prepared.tokenizer, progress=False)
    ((_, batch),) = speech.in_order(4)
    logits = []
    with torch.no_grad():
        for model in (prepared.packed_copy().model, prepared.model):
            lattice = model(batch.features, batch.feature_lengths, batch.targets)
            logits.append(model.joint.combine(lattice.frames[:, :, None], lattice.positions[:, None]))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        Recognizer.load(tmp_path / "nothing")


def test_a_truncated_file_is_refused(staged, tmp_path):
    path = tmp_path / "m"
    staged.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError):
        Recognizer.load(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda description: description.pop("model"),
        lambda description: description.update(format="gq_triton.recognizer.9"),
        lambda description: description.update(stage="frozen"),
        lambda description: description.update(tokenizer={"kind": "magic"}),
        lambda description: description["model"].update(encoder_hidden=25),
        lambda description: description["model"].update(encoder_hidden="many"),
        lambda description: description["model"].update(encoder_hidden=10**7),
        lambda description: description["model"].update(predictor_layers=10**9),
        lambda description: description["model"].update(small_encoder_layers=10**9, small_encoder_hidden=1),
        lambda description: description["model"].update(small_encoder_layers=2, small_encoder_hidden=10),
        lambda description: description["front_end"].update(n_mels=-1),
        lambda description: description["front_end"].update(n_mels=10**6),
        lambda description: description["tokenizer"]["symbols"].append("fa"),
        lambda description: description.update(quantization=[["*", {"bits": 99}]]),
        lambda description: description.update(quantization=[1]),
    ],
)
def test_a_description_that_does_not_fit_is_refused(staged, edit, tmp_path):
    path = tmp_path / "m"
    staged.save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = json.loads(metadata["state"])
    edit(description)
    save_file(tensors, path, {**metadata, "state": json.dumps(description)})
    with pytest.raises(ValueError):
        Recognizer.load(path)


def test_a_safetensors_file_of_another_program_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "m")
    with pytest.raises(ValueError, match="not a file of this program"):
        Recognizer.load(tmp_path / "m")
