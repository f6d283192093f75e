import pytest
import tones
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.training.data import SpeechSet, epoch_batches, item_duration, load_batches


class Lengths:
    """A training set of which only the lengths and the speakers matter."""

    cached = True

    def __init__(self, durations, speeds=(1.0,), speakers=None):
        self.durations, self.speeds = durations, speeds
        self.speakers = speakers or ["one"] * len(durations)


@pytest.fixture(scope="module")
def speech():
    spoken = tones.utterances(7)
    recognizer = tones.recognizer(spoken)
    return SpeechSet(spoken, recognizer.front_end, recognizer.tokenizer, speeds=(0.9, 1.0, 1.1), progress=False)


@settings(max_examples=50)
@given(
    durations=st.lists(st.floats(0.1, 30), min_size=1, max_size=80),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    join=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_an_epoch_begins_an_item_with_every_utterance_once(durations, batch_size, seed, epoch, join):
    data = Lengths(durations, (0.9, 1.0))
    batches = epoch_batches(data, batch_size, seed=seed, epoch=epoch, join=join)
    items = [item for batch in batches for item in batch]
    assert sorted(item[0][0] for item in items) == list(range(len(durations)))
    assert {speed for item in items for _, speed in item} <= {0.9, 1.0}
    sizes = {len(batch) for batch in batches}
    assert len(batches) == -(-len(durations) // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert batches == epoch_batches(data, batch_size, seed=seed, epoch=epoch, join=join)


def test_epochs_and_seeds_differ():
    data = Lengths([1.0 + 0.1 * n for n in range(40)], (0.9, 1.0, 1.1))
    orders = [epoch_batches(data, 4, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])


def test_batches_hold_similar_lengths():
    data = Lengths([float(n) for n in range(1, 201)])
    batches = epoch_batches(data, 10, seed=0, epoch=0)
    padded = sum(len(batch) * max(item_duration(data, item) for item in batch) for batch in batches)
    assert padded < 1.15 * sum(data.durations)


def test_joining_follows_an_utterance_with_one_of_its_speaker():
    speakers = [f"s{n % 5}" for n in range(400)]
    data = Lengths([1.0 + n / 100 for n in range(400)], (0.9, 1.1), speakers)
    items = [item for batch in epoch_batches(data, 8, seed=0, epoch=0, join=0.3) for item in batch]
    assert sorted(item[0][0] for item in items) == list(range(400))
    joined = [item for item in items if len(item) == 2]
    assert 80 < len(joined) < 160
    for (first, speed), (second, other_speed) in joined:
        assert speakers[first] == speakers[second] and speed == other_speed


def test_joined_utterances_are_one_after_the_other(speech):
    features, targets = speech[((1, 0.9), (4, 1.1))]
    first, second = speech[((1, 0.9),)], speech[((4, 1.1),)]
    assert torch.equal(features, torch.cat([first[0], second[0]]))
    assert targets.tolist() == [*first[1].tolist(), *second[1].tolist()]


def test_a_batch_is_padded_with_zeros(speech):
    items = [((0, 1.0),), ((1, 0.9), (4, 0.9)), ((2, 1.1),)]
    (batch,) = load_batches(speech, [items])
    for row, item in enumerate(items):
        features, targets = speech[item]
        assert torch.equal(batch.features[row, : len(features)], features)
        assert not batch.features[row, len(features) :].any()
        assert batch.targets[row, : len(targets)].tolist() == targets.tolist()
        assert (batch.feature_lengths[row], batch.target_lengths[row]) == (len(features), len(targets))


def test_speed_changes_the_length(speech):
    slow, usual, fast = (len(speech[((0, speed),)][0]) for speed in (0.9, 1.0, 1.1))
    assert slow / usual == pytest.approx(1 / 0.9, rel=0.05)
    assert fast / usual == pytest.approx(1 / 1.1, rel=0.05)


def test_features_come_out_the_same_kept_or_computed_anew_by_workers(speech):
    fresh = SpeechSet(speech.utterances, speech.front_end, tones.recognizer(speech.utterances).tokenizer, cached=False)
    items = [[((0, 1.0),), ((3, 0.9), (4, 0.9))], [((5, 1.1),)]]
    for kept, computed in zip(load_batches(speech, items), load_batches(fresh, items), strict=True):
        assert torch.equal(kept.features, computed.features)
        assert torch.equal(kept.targets, computed.targets)


def test_in_order_gives_all_utterances_longest_first(speech):
    seen = [
        (index, length)
        for indices, batch in speech.in_order(3)
        for index, length in zip(indices, batch.feature_lengths, strict=True)
    ]
    assert sorted(index for index, _ in seen) == list(range(7))
    assert [length for _, length in seen] == sorted((length for _, length in seen), reverse=True)


def test_the_digest_tells_sets_apart(speech):
    tokenizer = tones.recognizer(speech.utterances).tokenizer
    other = SpeechSet(speech.utterances[1:], speech.front_end, tokenizer, speeds=speech.speeds, cached=False)
    slower = SpeechSet(speech.utterances, speech.front_end, tokenizer, speeds=(0.8,), cached=False)
    assert len({speech.digest(), other.digest(), slower.digest()}) == 3


def test_bad_sets_are_refused(speech):
    tokenizer = tones.recognizer(speech.utterances).tokenizer
    with pytest.raises(ValueError, match="utterances is empty"):
        SpeechSet([], speech.front_end, tokenizer)
    for speeds in ((), (0.0,), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="speeds"):
            SpeechSet(speech.utterances, speech.front_end, tokenizer, speeds=speeds)
