import json
from dataclasses import replace

import pytest
import tones

from gq_triton.cli.quantization import allocation
from gq_triton.models import CTC
from gq_triton.speech.datasets import manifest as read_manifest
from gq_triton.speech.datasets import speaker_split
from gq_triton.speech.recognizer import Recognizer
from gq_triton.training import data as training_data
from gq_triton.training.data import SpeechSet


def test_training_leaves_a_recognizer_and_its_log(run):
    recognizer = Recognizer.load(run / "recognizer.safetensors")
    assert recognizer.stage == "float"
    assert recognizer.tokenizer.vocab_size == 6
    assert (run / "metrics.csv").is_file()
    assert json.loads((run / "config.json").read_text())["train"]["epochs"] == 1


def test_training_again_finds_its_checkpoint(gq_triton, run, manifest):
    before = (run / "recognizer.safetensors").read_bytes()
    data = ("--data", "manifest", "--root", manifest)
    small = ("--preset", "tiny", "--tokenizer", "word", "--set", "epochs=1", "--set", "speeds=1")
    result = gq_triton.json("train", *data, *small, "--output", run)
    assert result["recognizer"] == str(run / "recognizer.safetensors")
    assert result["stage"] == "float"
    assert (run / "recognizer.safetensors").read_bytes() == before
    message = gq_triton.fails("train", *data, *small, "--output", run, "--set", "seed=5")
    assert "another configuration" in message
    assert "seed=0 there, 5 here" in message
    assert "--overwrite" in message


def test_overwriting_begins_anew(gq_triton, manifest, tmp_path):
    data = ("--data", "manifest", "--root", manifest, "--preset", "tiny", "--set", "epochs=1", "--set", "speeds=1")
    for seed in (0, 1):
        options = ("--tokenizer", "char", "--overwrite", "--set", f"seed={seed}")
        gq_triton.succeeds("train", *data, *options, "--output", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["seed"] == 1


def test_held_out_speakers_are_measured_and_not_trained_on(gq_triton, manifest, tmp_path):
    options = ("--preset", "tiny", "--tokenizer", "word", "--set", "epochs=1", "--set", "speeds=1", "--hold-out", 0.5)
    gq_triton.succeeds("train", "--data", "manifest", "--root", manifest, *options, "--output", tmp_path)
    assert ",wer," in (tmp_path / "metrics.csv").read_text()
    kept, held_out = speaker_split(read_manifest(manifest), 0.5)
    assert len(held_out) == len(kept) == 6  # two of the four speakers
    recognizer = Recognizer.load(tmp_path / "recognizer.safetensors")
    trained_on = SpeechSet(kept, recognizer.front_end, recognizer.tokenizer)
    assert json.loads((tmp_path / "config.json").read_text())["data"] == trained_on.digest()


def test_librispeech_comes_all_the_way(gq_triton, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "CACHE_HOURS", 0)  # as of a large set: features are computed by workers
    spoken = tones.utterances(18)
    splits = {"train-clean-100": spoken[:8], "train-clean-360": spoken[8:14], "dev-clean": spoken[14:]}
    root = tones.write_librispeech(tmp_path / "data", splits)
    data = ("--data", "librispeech", "--root", root, "--split", "train-clean-100", "--split", "train-clean-360")
    data += ("--evaluate-on", "dev-clean", "--set", "epochs=2", "--set", "batch_seconds=6", "--set", "max_seconds=0.9")
    result = gq_triton("train", *data, "--preset", "tiny", "--vocab-size", 16, "--output", tmp_path / "float")
    assert result.exit_code == 0, result.output
    long = sum(utterance.duration > 0.9 for utterance in spoken[:14])
    assert f"Warning: {long} of 14 utterances are left out: max_seconds is 0.9" in result.stderr
    assert (tmp_path / "float" / "metrics.csv").read_text().count(",wer,") == 2
    settings = json.loads((tmp_path / "float" / "config.json").read_text())["train"]
    assert (settings["batch_seconds"], settings["time_masks"], settings["precision"] != "auto") == (6.0, 10, True)
    gq_triton.succeeds("qat", tmp_path / "float", "--bits", 4, *data, "--output", tmp_path / "qat")
    gq_triton.succeeds("convert", tmp_path / "qat", "--output", tmp_path / "packed.safetensors")
    options = ("--data", "librispeech", "--root", root, "--split", "dev-clean")
    assert gq_triton.json("evaluate", tmp_path / "packed.safetensors", *options)["utterances"] == 4


def test_another_manifest_is_evaluated_on(gq_triton, manifest, tmp_path):
    other = tones.write_manifest(tmp_path / "other", tones.utterances(3, seed=1))
    options = ("--preset", "tiny", "--tokenizer", "word", "--set", "epochs=1", "--set", "speeds=1")
    data = ("--data", "manifest", "--root", manifest, "--evaluate-on", other)
    gq_triton.succeeds("train", *data, *options, "--output", tmp_path / "run")
    assert ",wer," in (tmp_path / "run" / "metrics.csv").read_text()


def test_a_conformer_with_ctc_comes_all_the_way(gq_triton, manifest, tmp_path):
    data = ("--data", "manifest", "--root", manifest, "--set", "epochs=1", "--set", "speeds=1")
    model = ("--preset", "conformer-tiny", "--ctc", "--tokenizer", "word")
    gq_triton.succeeds("train", *data, *model, "--output", tmp_path / "float")
    gq_triton.succeeds("qat", tmp_path / "float", "--bits", 4, *data, "--output", tmp_path / "qat")
    gq_triton.succeeds("convert", tmp_path / "qat", "--output", tmp_path / "packed.safetensors")
    audio = min(manifest.parent.glob("*.flac"))
    gq_triton.succeeds("transcribe", "--model", tmp_path / "packed.safetensors", "--stream", audio)
    packed = Recognizer.load(tmp_path / "packed.safetensors")
    assert packed.stage == "packed" and isinstance(packed.model, CTC)


def test_quantized_training_keeps_the_widths_asked_for(qat_run):
    recognizer = Recognizer.load(qat_run / "recognizer.safetensors")
    assert recognizer.stage == "qat"
    assert recognizer.quantization["joint.output"] is None
    assert recognizer.quantization["*"].bits == 3
    assert list(recognizer.quantization) == ["joint.output", "*"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "an4"), "--data an4 needs --root PATH"),
        (("--data", "an4", "--root", "nowhere"), "nowhere"),
        (("--data", "manifest", "--root", "nowhere.tsv"), "nowhere.tsv"),
        (("--data", "timit"), "'timit'"),
        (("--root", "an4"), "--root needs --data"),
        (("--vocab-size", "90"), "--vocab-size counts subwords"),
        (("--set", "epoch=3"), "no training setting is called epoch; allowed: epochs, "),
        (("--set", "epochs"), "NAME=VALUE is needed"),
        (("--set", "epochs=0"), "epochs is 0"),
        (("--preset", "giant"), "'giant'"),
        (("--hold-out", "1"), "--hold-out"),
        (("--hold-out", "0.5", "--evaluate-on", "test"), "--hold-out and --evaluate-on both say"),
        (("--evaluate-on", "dev"), "dev"),
        (("--parallel", "dp"), "'dp'"),
        (("--set", "precision=half"), "precision is half; allowed: auto, float32, bfloat16"),
        (("--split", "dev"), "dev"),
        (("--data", "manifest", "--root", "a.tsv", "--split", "x"), "--split does not go with it"),
    ],
)
def test_a_bad_option_is_named(gq_triton, tmp_path, arguments, message):
    assert message in gq_triton.fails("train", *arguments, "--output", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say how many bits"),
        (("--bits", "9"), "--bits"),
        (("--layer", "joint=9"), "PATTERN=BITS is needed"),
        (("--layer", "joint"), "PATTERN=BITS is needed"),
        (("--bits", "4", "--codebook", "int4"), "int4"),
    ],
)
def test_a_bad_width_is_named(gq_triton, run, manifest, tmp_path, arguments, message):
    data = ("--data", "manifest", "--root", manifest, "--output", tmp_path / "q")
    assert message in gq_triton.fails("qat", run, *arguments, *data)


def test_the_first_of_equal_patterns_wins():
    options = {"method": "gq", "codebook": "float", "activations": "none", "granularity": "channel"}
    chosen = allocation(5, ("joint=8", "joint=4", "*=2", "encoder=float"), **options)
    assert {pattern: config and config.bits for pattern, config in chosen.items()} == {
        "joint": 8,
        "*": 2,
        "encoder": None,
    }


def test_transcripts_that_a_recognizer_does_not_know_are_counted(gq_triton, run, tmp_path):
    known, strange = tones.utterances(2)
    strange = replace(strange, text="DO do")
    manifest = tones.write_manifest(tmp_path, [known, strange])
    options = ("--bits", 4, "--set", "epochs=1", "--set", "speeds=1", "--output", tmp_path / "q")
    result = gq_triton("qat", run, "--data", "manifest", "--root", manifest, *options)
    assert result.exit_code == 0
    total = len(known.text.split()) + 2
    assert f"Warning: 1 of {total} tokens of the transcripts are unknown to the recognizer" in result.stderr


def test_a_run_does_not_write_over_the_recognizer_it_starts_from(gq_triton, run):
    before = (run / "recognizer.safetensors").read_bytes()
    for model in (run, run / "recognizer.safetensors"):
        message = gq_triton.fails("qat", model, "--bits", 4, "--output", run, "--overwrite")
        assert "holds the float recognizer itself" in message
    assert (run / "recognizer.safetensors").read_bytes() == before


def test_an_output_that_is_a_file_is_named_at_once(gq_triton, manifest):
    message = gq_triton.fails("train", "--data", "manifest", "--root", manifest, "--output", manifest)
    assert "is a file" in message


def test_only_a_float_recognizer_is_quantized(gq_triton, qat_run, tmp_path):
    message = gq_triton.fails("qat", qat_run, "--bits", 4, "--output", tmp_path / "q")
    assert "is qat already" in message
