import json

import pytest

import gq_triton as gq
from gq_triton.cli import allocate
from gq_triton.speech.recognizer import Recognizer


def model_of(run):
    return Recognizer.load(run / "recognizer.safetensors").model


@pytest.fixture(scope="module")
def options(run, manifest):
    """What these commands are given, but for the budget and the output."""
    return (
        run,
        "--data",
        "manifest",
        "--root",
        manifest,
        "--widths",
        "8,1",
        "--float",
        "predictor*",
        "--utterances",
        3,
    )


@pytest.fixture(scope="module")
def chosen(gq_triton, options, tmp_path_factory):
    """A file of widths, its measurements beside it, and what was printed."""
    file = tmp_path_factory.mktemp("widths") / "w.json"
    return file, gq_triton.json("allocate", *options, "--bits-per-weight", 4, "--output", file)


@pytest.fixture
def calls(monkeypatch):
    """Of the loss, and the number of its utterances."""
    sizes = []
    loss = allocate.loss_per_token
    monkeypatch.setattr(
        allocate, "loss_per_token", lambda model, speech: sizes.append(len(speech)) or loss(model, speech)
    )
    return sizes


def test_widths_meet_the_budget(run, chosen):
    file, result = chosen
    config = gq.load_config(file)
    assert {name: each.bits for name, each in config.items()} == {row["name"]: row["bits"] for row in result["weights"]}
    assert {row["bits"] for row in result["weights"]} == {1, 8}
    uniform = gq.report(gq.quantize_(model_of(run), {"predictor*": None, "*": gq.GQConfig(bits=4)}))
    assert result["bytes"] == gq.report(gq.quantize_(model_of(run), config)).packed_bytes <= uniform.packed_bytes


def test_changes_are_told(chosen):
    _, result = chosen
    assert all(row["changes"].keys() == {"1", "8"} for row in result["weights"])
    charged = [
        max(change for bits, change in row["changes"].items() if int(bits) >= row["bits"]) for row in result["weights"]
    ]
    assert result["predicted_change"] == pytest.approx(sum(charged))
    assert result["measured_change"] not in (0, result["predicted_change"])


def test_another_budget_needs_no_other_measurements(gq_triton, options, chosen, tmp_path, calls):
    file, first = chosen
    measurements = file.with_name("w.sensitivity.json")
    before = measurements.read_bytes()
    output = ("--output", tmp_path / "x.json", "--figure", tmp_path / "x.png")
    text = gq_triton.succeeds("allocate", *options, "--bytes", 10**9, *output, "--measurements", measurements)
    assert calls == [3] * 3  # of the float model, twice, and of the chosen widths
    assert measurements.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    lines = text.splitlines()
    assert lines[0].split() == ["weight", "bits", "bytes", "loss", "at", "1", "loss", "at", "8"]
    assert [line.split()[0] for line in lines[2:-3]] == [row["name"] for row in first["weights"]]
    assert {line.split()[1] for line in lines[2:-3]} == {"8"}
    assert lines[-2].startswith(f"loss per token: {first['loss']:.4f}; with these widths, untrained, predicted ")


def test_only_held_out_speakers_are_heard(gq_triton, options, tmp_path, calls):
    more = ("--widths", 8, "--utterances", 99, "--hold-out", 0.5, "--output", tmp_path / "w.json", "--bytes", 10**9)
    gq_triton.succeeds("allocate", *options, *more)
    assert set(calls) == {6}  # two of four speakers, with three utterances each


def test_widths_are_trained_and_converted(gq_triton, run, manifest, chosen, tmp_path):
    config = ("--config", chosen[0])
    data = ("--data", "manifest", "--root", manifest, "--set", "epochs=1", "--set", "speeds=1")
    gq_triton.succeeds("qat", run, *config, *data, "--output", tmp_path / "qat")
    gq_triton.succeeds("convert", tmp_path / "qat", "--output", tmp_path / "trained")
    result = gq_triton.json("convert", run, *config, "--output", tmp_path / "untrained")
    assert result["bytes"] == chosen[1]["bytes"]
    for name in ("trained", "untrained"):
        assert Recognizer.load(tmp_path / name).quantization == gq.load_config(chosen[0])


@pytest.mark.parametrize(
    "option", [("--bits", 4), ("--layer", "joint=4"), ("--codebook", "int8"), ("--granularity", "channel")]
)
def test_a_file_goes_with_no_other_option(gq_triton, run, qat_run, chosen, tmp_path, option):
    output = ("--output", tmp_path / "x")
    for command in ("qat", "convert"):
        message = gq_triton.fails(command, run, "--config", chosen[0], *option, *output)
        assert f"--config says how to quantize: {option[0]} does not go with it" in message
    assert "--config does not go with it" in gq_triton.fails("convert", qat_run, "--config", chosen[0], *output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, message",
    [(None, "c.json does not exist"), ({"bits": 4}, "its 'format' must be 'gq_triton quantization'")],
)
def test_a_bad_file_is_named(gq_triton, run, tmp_path, content, message):
    if content:
        (tmp_path / "c.json").write_text(json.dumps(content))
    assert message in gq_triton.fails("convert", run, "--config", tmp_path / "c.json", "--output", tmp_path / "m")


@pytest.mark.parametrize(
    "budget, message",
    [
        ((), "one budget is needed: --bytes N or --bits-per-weight X"),
        (("--bytes", 9, "--bits-per-weight", 3), "one budget is needed"),
        (("--bytes", 9), "max_bytes is 9; the model takes"),
        (("--bits-per-weight", 9), "--bits-per-weight"),
        (("--bytes", 10**9, "--widths", "1,9"), "'1,9': widths from 1 to 8 are needed"),
        (("--bytes", 10**9, "--float", "*"), "it selects none"),
        (("--bytes", 10**9, "--granularity", "tensor"), "w.sensitivity.json has measurements of another model or with"),
    ],
)
def test_a_bad_option_is_named(gq_triton, options, chosen, tmp_path, budget, message):
    output = ("--output", tmp_path / "w.json", "--measurements", chosen[0].with_name("w.sensitivity.json"))
    assert message in gq_triton.fails("allocate", *options, *output, *budget)
    assert not list(tmp_path.iterdir())


def test_only_a_float_recognizer_is_measured(gq_triton, qat_run, tmp_path):
    message = gq_triton.fails("allocate", qat_run, "--bytes", 10**9, "--output", tmp_path / "w.json")
    assert "is qat already; a float recognizer is needed" in message
