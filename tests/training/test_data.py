import pytest
import tones
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.training import TrainConfig
from gq_triton.training.data import BatchPlan, SpeechSet, item_duration, load_batches


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


def seconds(data, batch):
    """Of audio, padding included."""
    return len(batch) * max(item_duration(data, item) for item in batch)


DURATIONS = st.lists(st.floats(0.1, 30), min_size=1, max_size=80)


@settings(max_examples=50)
@given(
    durations=DURATIONS,
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    join=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_an_epoch_begins_an_item_with_every_utterance_once(durations, batch_size, seed, epoch, join):
    data = Lengths(durations, (0.9, 1.0))
    plan = BatchPlan(data, TrainConfig(batch_size=batch_size, seed=seed, join=join))
    batches = plan.epoch(epoch)
    items = [item for batch in batches for item in batch]
    assert sorted(item[0][0] for item in items) == list(range(len(durations)))
    assert {speed for item in items for _, speed in item} <= {0.9, 1.0}
    sizes = {len(batch) for batch in batches}
    assert len(batches) == len(plan) == -(-len(durations) // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert batches == plan.epoch(epoch)


@settings(max_examples=100)
@given(
    durations=DURATIONS,
    spare=st.floats(1, 20),
    speeds=st.sampled_from([(1.0,), (0.9, 1.0, 1.1), (1.2,)]),
    max_seconds=st.sampled_from([0.0, 5.0, 30.0]),
    seed=st.integers(0, 5),
)
def test_batches_by_seconds_are_as_many_in_every_epoch_and_never_longer(durations, spare, speeds, max_seconds, seed):
    data = Lengths([0.1, *durations], speeds)
    kept = [index for index, duration in enumerate(data.durations) if duration <= (max_seconds or 99)]
    limit = spare * max(data.durations[index] for index in kept) / min(speeds)
    config = TrainConfig(batch_seconds=limit, max_seconds=max_seconds, seed=seed, curriculum_epochs=1)
    plan = BatchPlan(data, config)
    for epoch in range(4):
        batches = plan.epoch(epoch)
        assert sorted(len(batch) for batch in batches) == sorted(plan.sizes)
        assert max(seconds(data, batch) for batch in batches) <= limit * (1 + 1e-12)
        assert sorted(index for batch in batches for ((index, _),) in batch) == kept
        assert batches == BatchPlan(data, config).epoch(epoch)


def test_batches_by_seconds_are_well_filled_and_have_no_small_rest():
    draw = torch.Generator().manual_seed(0)
    durations = (1.5 + 14 * torch.rand(5000, generator=draw)).tolist()
    data = Lengths(durations, (0.9, 1.0, 1.1))
    plan = BatchPlan(data, TrainConfig(batch_seconds=300.0))
    filled = [seconds(data, batch) for epoch in range(2) for batch in plan.epoch(epoch)]
    assert sum(filled) / len(filled) > 0.8 * 300
    assert min(plan.sizes) >= 300 // (15.5 / 0.9) // 2
    played = sum(item_duration(data, item) for batch in plan.epoch(0) for item in batch)
    assert sum(filled[: len(plan)]) < 1.05 * played  # padding


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seconds": 2.0}, "max_seconds is 2.0; the shortest utterance has 3.0 s"),
        ({"batch_seconds": 10.0}, "batch_seconds is 10.0; the longest utterance alone has 10.5 s .* by max_seconds"),
    ],
)
def test_limits_that_leave_nothing_to_do_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(Lengths([3.0, 9.45], (0.9, 1.0)), TrainConfig(**settings))


def test_epochs_and_seeds_differ():
    data = Lengths([10.0 + 0.02 * n for n in range(100)])
    for limits in ({"batch_size": 4}, {"batch_seconds": 50.0}):
        plans = [BatchPlan(data, TrainConfig(**limits, seed=seed)) for seed in (0, 1)]
        orders = [[sorted(batch) for batch in plan.epoch(epoch)] for plan in plans for epoch in (0, 1)]
        assert all(a != b for n, a in enumerate(orders) for b in orders[:n])
        batches = [{tuple(batch) for batch in order} for order in orders]
        assert len(batches[0] & batches[1]) < len(orders[0]) / 2  # neighbours change, not only the order of batches


def test_batches_hold_similar_lengths():
    data = Lengths([float(n) for n in range(1, 201)])
    batches = BatchPlan(data, TrainConfig(batch_size=10)).epoch(0)
    assert sum(seconds(data, batch) for batch in batches) < 1.15 * sum(data.durations)


def test_a_curriculum_is_not_joined_and_begins_with_the_shortest():
    data = Lengths([float(n) for n in range(1, 41)])
    plan = BatchPlan(data, TrainConfig(batch_size=4, join=1.0, curriculum_epochs=1))
    easy, usual = plan.epoch(0), plan.epoch(1)
    assert {len(item) for batch in easy for item in batch} == {1}
    assert {len(item) for batch in usual for item in batch} == {2}
    longest = [max(item_duration(data, item) for item in batch) for batch in easy]
    assert longest == sorted(longest)


def test_joining_follows_an_utterance_with_one_of_its_speaker():
    speakers = [f"s{n % 5}" for n in range(400)]
    data = Lengths([1.0 + n / 100 for n in range(400)], (0.9, 1.1), speakers)
    plan = BatchPlan(data, TrainConfig(batch_size=8, join=0.3, max_seconds=4.0))
    items = [item for batch in plan.epoch(0) for item in batch]
    assert sorted(item[0][0] for item in items) == list(range(301))
    joined = [item for item in items if len(item) == 2]
    assert 60 < len(joined) < 120
    for (first, speed), (second, other_speed) in joined:
        assert speakers[first] == speakers[second] and speed == other_speed
        assert data.durations[second] <= 4.0


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
