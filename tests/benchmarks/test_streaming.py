"""The benchmark of streaming recognizers, on models and audio that take seconds."""

import json
import mmap
import sys
import time

import numpy as np
import pytest
import soundfile
import streaming_models
import streaming_on_torch
import streaming_worker
import torch
from click import ClickException
from harness import Unavailable, Wrong
from matplotlib.image import imread
from scripts import load_script
from streaming_schedule import first_label_spoken, forced_labels, frames_within

from gq_triton.kernels import native
from gq_triton.models.rnnt import RNNT, RNNTConfig

streaming = load_script("benchmarks/streaming.py")
MEASURED = ("torch fp32", "torch int8", "gq int8/5")
ON_RUNNER = ("runner gq int8/5",) if native.available() else ()
CONTENDERS = (*MEASURED, *ON_RUNNER, "runner gq/9")
PLAN = streaming.Plan((streaming.Suite("tiny", 1, 60, 2, CONTENDERS),), seconds=(0.5, 1.0), label_ms=180, slowest=1e3)
VARIANT = {"label_frames": 3, "subsampling": 6, "vocab_size": 50, "tail_samples": 800, "chunk_frames": 12}
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def tiny():
    config = RNNTConfig.preset("base", 50, encoder_hidden=32, joint=24, predictor_hidden=16, predictor_embedding=8)
    return streaming_models.recognizer_of(RNNT(config))


def tiny_bifocal():
    sizes = dict(encoder_hidden=32, small_encoder_hidden=16, joint=24, predictor_hidden=16, predictor_embedding=8)
    return streaming_models.recognizer_of(RNNT(RNNTConfig.preset("bifocal", 50, **sizes)))


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    (folder / "speaker").mkdir()
    for place, seconds in enumerate((0.7, 0.2, 0.71, 0.7, 2.0)):
        samples = 0.1 * np.random.default_rng(place).standard_normal(int(16000 * seconds))
        soundfile.write(folder / "speaker" / f"{place}.wav", samples, 16000)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory, speech):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "WORK", tmp_path_factory.mktemp("work"))
        patch.setattr(streaming.harness, "ceilings", lambda device: {})
        patch.setitem(streaming_models.MODELS, "tiny", tiny)
        return streaming.run(PLAN, tmp_path_factory.mktemp("record"), speech)


@pytest.fixture
def record(path):
    return json.loads(path.read_text())


# --- the whole


@needs_linux
@pytest.mark.parametrize("name", [*MEASURED, *ON_RUNNER])
def test_contenders_are_measured(record, name):
    (entry,) = record["cases"]
    assert entry["case"] == {"model": "tiny", "threads": 1, "chunk_ms": 60}
    result = entry["results"][name]
    waits = result["samples"]["upl_ms"]
    assert len(waits) == 2
    assert min(waits) <= result["upl_ms"]["p50"] <= result["upl_ms"]["p90"] <= result["upl_ms"]["p99"] <= max(waits)
    assert 0 < result["floor_ms"]["p50"] < result["upl_ms"]["p50"]
    assert min(result["first_partial_ms"]["p50"], result["chunk_ms"]["p50"], result["rtf"]) > 0
    memory = result["memory"]
    assert memory["idle"]["rss"] < memory["played"]["rss"] <= 1.01 * memory["played"]["peak"]
    assert memory["played"]["private"] <= memory["played"]["pss"] <= memory["played"]["rss"] == result["process_bytes"]


@needs_linux
def test_bytes_are_those_of_the_precision(record):
    (entry,) = record["cases"]
    bytes_of = {name: result["weight_bytes"] for name, result in entry["results"].items() if "upl_ms" in result}
    parameters = sum(parameter.numel() for parameter in tiny().model.parameters())
    assert bytes_of["torch fp32"] == 4 * parameters
    assert parameters < bytes_of["torch int8"] < 2 * parameters
    assert 5 / 8 * parameters < bytes_of["gq int8/5"] < bytes_of["torch int8"]
    files = {name: result["file_bytes"] for name, result in entry["results"].items() if "upl_ms" in result}
    assert files["torch int8"] is None
    assert files["gq int8/5"] < files["torch fp32"]


@needs_linux
def test_errors_grow_as_widths_shrink(record):
    (entry,) = record["cases"]
    errors = [entry["results"][name]["error"] for name in ("torch fp32", "torch int8", "gq int8/5")]
    assert errors[0] == 0 < errors[1] < errors[2] < 0.5


@needs_linux
def test_what_was_played_is_told(record):
    assert record["settings"]["played"] == {"0": 0.7, "2": 0.71}  # of the right length, from all over the folder


@needs_linux
def test_a_contender_that_cannot_run_is_told(record):
    (entry,) = record["cases"]
    assert entry["results"]["runner gq/9"] == {"absent": "KeyError: 'gq/9'"}


@needs_linux
def test_the_figure_is_drawn(record, tmp_path):
    load_script("plots/streaming.py").draw(record, tmp_path / "streaming.png")
    assert imread(tmp_path / "streaming.png").shape[1] == 1500


@needs_linux
def test_the_readme_table_is_made(path, record):
    lines = load_script("plots/readme.py").table(path).splitlines()
    (own,) = [line for line in lines if line.startswith("| GQ, 5 bits, int8 activations |")]
    result = record["cases"][0]["results"]["gq int8/5"]
    assert own.endswith(f"| {result['rtf']:.2g} |")
    assert "2 utterances of 0.7 to 0.7 s" in lines[-1]
    assert "chunks of 60 ms, 1 thread" in lines[-1]


# --- recognizers


@pytest.mark.parametrize("name, size", [("torch fp32", 4), ("torch bf16", 2), ("torch int8", 1)])
def test_peers_emit_what_they_must_and_compute_what_they_should(name, size, tmp_path, monkeypatch):
    monkeypatch.setitem(streaming_models.MODELS, "tiny", tiny)
    monkeypatch.setattr(torch.backends.mkldnn, "set_flags", lambda **flags: None)  # which would last
    file = streaming_models.model_file("tiny", None, tmp_path).path
    logits = {}
    for each in (name, "torch fp32"):
        variant = VARIANT | {"name": each, "file": str(file), "threads": 1, "chunk_ms": 120}
        recognizer = streaming_on_torch.OnTorch(variant)
        for _ in range(2):
            recognizer.restart()
            assert recognizer.push(np.sin(np.arange(9600, dtype=np.float32))) == 2
            assert recognizer.finish() == 4  # 58 frames, and 30 of silence, are 14 of the encoder's
        logits[each] = recognizer.logits
    assert logits[name].dtype == np.float32
    assert streaming.rms_error(logits[name], logits["torch fp32"]) < 0.05
    parameters = sum(parameter.numel() for parameter in tiny().model.parameters())
    assert (
        size * parameters <= streaming_on_torch.OnTorch(variant | {"name": name}).weight_bytes < 1.5 * size * parameters
    )


def runtimes():
    """Of packed files."""
    if not native.available():
        return [streaming_on_torch.OnTorch]
    import streaming_on_runner

    return [streaming_on_torch.OnTorch, streaming_on_runner.OnRunner]


@pytest.mark.parametrize("name", ["torch bf16", "torch int8", "gq/8", "gq int8/8"])
def test_the_small_encoder_takes_the_wake_word(name, tmp_path, monkeypatch):
    monkeypatch.setitem(streaming_models.MODELS, "tiny", tiny_bifocal)
    monkeypatch.setattr(torch.backends.mkldnn, "set_flags", lambda **flags: None)
    switches, samples = {"none": None, "part": 0.3, "all": 9.0}, np.sin(np.arange(9600, dtype=np.float32))

    def played(runtime, name, switch):
        file = streaming_models.model_file("tiny", None if name.startswith("torch") else name, tmp_path).path
        variant = VARIANT | {"name": name, "file": str(file), "threads": 1, "chunk_ms": 120, "switch_seconds": switch}
        recognizer = runtime(variant)
        for _ in range(2):
            recognizer.restart()
            recognizer.push(samples)
            assert recognizer.finish() == 4
        return recognizer.logits

    expected = {case: played(streaming_on_torch.OnTorch, "torch fp32", switch) for case, switch in switches.items()}
    for runtime in [streaming_on_torch.OnTorch] if name.startswith("torch") else runtimes():
        for case, switch in switches.items():
            assert streaming.rms_error(played(runtime, name, switch), expected[case]) < 0.1
    assert streaming.rms_error(expected["all"], expected["none"]) > 0.2
    assert streaming.rms_error(expected["part"], expected["none"]) > 0


def test_chunks_after_the_wake_word_need_no_small_encoder(tmp_path, monkeypatch):
    monkeypatch.setitem(streaming_models.MODELS, "tiny", tiny_bifocal)
    model = tiny_bifocal().model
    needed = sum(part.numel() for module in (model.encoder.large, model.joint) for part in module.parameters())
    assert streaming_models.model_file("tiny", None, tmp_path).chunk_bytes == 4 * needed


# --- what is played


def test_too_little_speech_is_an_error(speech):
    with pytest.raises(ClickException, match=r"has 1 recordings .* of 1 to 3 seconds, and 2 are needed"):
        streaming.utterances(speech, streaming.Plan(PLAN.suites, seconds=(1.0, 3.0)))


def test_recordings_become_samples(speech, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "WORK", tmp_path)
    samples = np.load(streaming.as_samples(speech / "speaker" / "1.wav"))
    assert samples.dtype == np.float32
    assert samples.shape == (3200,)


@pytest.mark.parametrize("plan", [streaming.Plan.quick(), streaming.Plan.full()], ids=["quick", "full"])
def test_plans_have_files_for_all_they_measure(plan):
    assert len({tuple(case.values()) for case in plan.cases()}) == len(plan.suites)
    for suite in plan.suites:
        assert suite.model in streaming_models.MODELS
        assert {streaming.precision_of(name) for name in suite.contenders} <= {None, *streaming_models.PRECISIONS}
        assert len(set(suite.contenders)) == len(suite.contenders)


@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_labels_come_at_the_same_frames_whatever_is_looked_at_at_once(window):
    """Driven as greedy decoding does, which takes the first label of a window and looks again from its frame on."""
    labels, times, place, frames = [], [], 0, 20
    while place < frames:
        found = forced_labels(place, min(window, frames - place), len(labels), VARIANT)
        blanks = next((index for index, label in enumerate(found) if label), len(found))
        place += blanks
        if blanks < len(found):
            labels.append(found[blanks])
            times.append(place)
    assert times == [2, 5, 8, 11, 14, 17]
    assert len(set(labels)) == len(labels)
    assert all(0 < label < VARIANT["vocab_size"] for label in labels)


@pytest.mark.parametrize("samples, frames", [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16000, 98)])
def test_frames_within(samples, frames):
    assert frames_within(samples) == frames


def test_the_first_label_is_spoken_when_its_frame_is_there():
    samples = round(16000 * first_label_spoken(VARIANT))
    assert frames_within(samples) == 3 * 6
    assert frames_within(samples - 1) == 3 * 6 - 1


# --- playing


class Recognizer:
    """Takes ``seconds`` for a chunk and ``last`` for the end; has a label from ``first`` samples on."""

    logits = np.zeros(3)

    def __init__(self, seconds=0.0, last=0.0, first=8000):
        self.seconds, self.last, self.first = seconds, last, first

    def restart(self):
        self.heard, self.blocks = 0, []

    def push(self, samples):
        chunks = frames_within(self.heard) // VARIANT["chunk_frames"]
        self.heard += len(samples)
        self.blocks.append(len(samples))
        if frames_within(self.heard) // VARIANT["chunk_frames"] > chunks:
            time.sleep(self.seconds)
        return int(self.heard >= self.first)

    def finish(self):
        time.sleep(self.last)
        return 2


def test_audio_is_played_at_its_pace():
    recognizer, start = Recognizer(last=0.05), time.perf_counter()
    played = streaming_worker.play(recognizer, np.zeros(9700, np.float32), VARIANT)
    assert time.perf_counter() - start > 9700 / 16000 + 0.05
    assert recognizer.blocks == [320] * 30 + [100]
    assert played["audio_s"] == 9700 / 16000
    assert 50 <= played["upl_ms"] < 150
    assert 0.05 <= played["compute_s"] < 0.15
    assert played["late_ms"] > 0


def test_what_is_left_to_the_end():
    """9700 samples: 59 frames, of which 48 make whole chunks; 64 with the silence, 60 of them 10 of the encoder's."""
    played = streaming_worker.play(Recognizer(), np.zeros(9700, np.float32), VARIANT)
    assert len(played["chunks_ms"]) == 4
    assert (played["left_calls"], played["labels"], played["wanted_labels"]) == (1, 2, 3)


def test_a_chunk_that_the_last_block_completes_is_left_to_the_end():
    played = streaming_worker.play(Recognizer(), np.zeros(400 + 47 * 160, np.float32), VARIANT | {"tail_samples": 0})
    assert len(played["chunks_ms"]) == 4
    assert played["left_calls"] == 1


def test_the_first_partial_is_timed_from_the_end_of_its_frame():
    played = streaming_worker.play(Recognizer(first=8000), np.zeros(9600, np.float32), VARIANT)
    assert 0 <= played["first_partial_ms"] - 1e3 * (0.5 - first_label_spoken(VARIANT)) < 100


def test_who_falls_behind_makes_one_wait():
    """Four chunks of 120 ms that take 200 ms each."""
    played = streaming_worker.play(Recognizer(seconds=0.2), np.zeros(9600, np.float32), VARIANT)
    assert played["upl_ms"] > 1e3 * (4 * 0.2 - (0.6 - 0.1275))
    assert min(played["chunks_ms"]) >= 200


# --- processes


@needs_linux
def test_memory_of_a_process():
    size = 1 << 27
    before = streaming_worker.memory()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:  # not what was freed before
        held.write(b"1" * size)
        after = streaming_worker.memory()
    for kind in ("rss", "pss", "private", "anonymous"):
        assert after[kind] - before[kind] == pytest.approx(size, rel=0.02)
    assert streaming_worker.memory()["peak"] >= 0.99 * after["rss"]


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "WORK", tmp_path)
    with streaming.Worker({"name": "gq/5", "threads": 1}) as made:
        yield made


def test_a_request_that_fails_is_answered(worker):
    with pytest.raises(Unavailable, match="KeyError: 'runtime'"):
        worker.ask("load", {})
    with pytest.raises(Unavailable, match="FileNotFoundError"):
        worker.ask("play", "nothing.npy")


def test_a_process_that_ends_is_told(worker):
    worker.process.kill()
    with pytest.raises(Unavailable, match="its process ended with status -9; see .*gq-5.log"):
        worker.ask("memory")
    with pytest.raises(Unavailable, match="status -9"):
        worker.ask("memory")


@needs_linux
def test_a_process_without_torch_has_none():
    code = "import streaming_worker, sys; streaming_worker.memory(); assert 'torch' not in sys.modules"
    paths = [str(streaming.WORKER.parent), str(streaming.ROOT)]
    run = streaming.subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {code}"], check=False)
    assert run.returncode == 0


# --- checks


def player(played=None, logits=(1.0, 2.0)):
    made = object.__new__(streaming.Player)
    made.worker = type("Worker", (), {"ask": lambda self, request, argument=None: dict(played)})()
    made.logits, made.plays = np.array(logits), []
    return made


def test_other_labels_are_wrong():
    with pytest.raises(Wrong, match="3 labels came where 4 were to be emitted"):
        player({"labels": 3, "wanted_labels": 4}).play("a")


def test_who_is_too_slow_is_left_out():
    played = {"labels": 4, "wanted_labels": 4, "compute_s": 8.0, "audio_s": 2.0, "logits": [0.0]}
    with pytest.raises(Unavailable, match="a second of speech takes it 4 s"):
        player(played).warm_up("a", slowest=3.0)
    made = player(played)
    made.warm_up("a", slowest=5.0)
    assert made.plays == []


def test_logits_are_held_against_float32():
    players = {"torch fp32": player(), "gq/8": player(logits=(1.1, 2.0)), "gq/2": player(logits=(3.0, 2.0))}
    assert streaming.check(players, "torch fp32") == 0
    assert streaming.check(players, "gq/8") == pytest.approx(0.1 / 5**0.5)
    assert streaming.check(players, "gq/2") == pytest.approx(2 / 5**0.5)
    players["gq/8"] = player(logits=(2.0, 2.0))
    with pytest.raises(Wrong, match=r"off by 0\.45 from those of float32"):
        streaming.check(players, "gq/8")
    assert streaming.check({"gq/2": player()}, "gq/2") is None


def test_two_runtimes_must_agree():
    players = {"gq/2": player(), "runner gq/2": player(logits=(1.0, 2.2))}
    with pytest.raises(Wrong, match=r"off by 0\.089 from those of the same file on torch"):
        streaming.check(players, "runner gq/2")
    players["runner gq/2"] = player()
    assert streaming.check(players, "runner gq/2") is None


def test_files_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setitem(streaming_models.MODELS, "tiny", tiny)
    made = streaming_models.model_file("tiny", "gq int8/mixed", tmp_path)
    written = made.path.stat().st_mtime_ns
    assert streaming_models.model_file("tiny", "gq int8/mixed", tmp_path) == made
    assert made.path.stat().st_mtime_ns == written
    assert made.sizes == {"subsampling": 6, "vocab_size": 50, "tail_samples": 4800}
    monkeypatch.setattr(streaming_models, "_sources", lambda: b"other")
    assert streaming_models.model_file("tiny", "gq int8/mixed", tmp_path).path != made.path


def test_mixed_has_one_bit_in_the_encoders_lstms(tmp_path, monkeypatch):
    monkeypatch.setitem(streaming_models.MODELS, "tiny", tiny)
    sizes = {
        name: streaming_models.model_file("tiny", name, tmp_path).chunk_bytes for name in ("gq/1", "gq/5", "gq/mixed")
    }
    assert sizes["gq/1"] < sizes["gq/mixed"] < sizes["gq/5"]


@pytest.mark.parametrize("model", ["rnnt", "bifocal"])
def test_the_models_have_60_million_weights(model):
    with torch.device("meta"):
        config = streaming_models.MODELS[model]().model.config
        count = sum(parameter.numel() for parameter in RNNT(config).parameters())
    assert 55e6 < count < 65e6


def test_quantiles():
    assert streaming.quantiles(range(101)) == {"p50": 50, "p90": 90, "p99": 99}


def test_reading_has_a_speed():
    assert streaming.read_gb_per_s(1 << 20, 1) > 0.1
    assert torch.get_num_threads() == 1
