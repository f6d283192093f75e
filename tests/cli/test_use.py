import pytest
import tones

import gq_triton as gq
from gq_triton.speech.recognizer import Recognizer


@pytest.fixture(scope="module")
def packed(gq_triton, qat_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    gq_triton.succeeds("convert", qat_run, "--output", path)
    return path


def test_a_prepared_model_is_converted(gq_triton, qat_run, packed, tmp_path):
    assert Recognizer.load(packed).stage == "packed"
    result = gq_triton.json("convert", qat_run, "--output", tmp_path / "m")
    assert result["bytes"] == gq.report(Recognizer.load(packed).model).packed_bytes
    assert result["file_bytes"] == (tmp_path / "m").stat().st_size
    assert result["ratio"] > 5


def test_a_float_model_is_quantized_without_training(gq_triton, run, tmp_path):
    options = ("--layer", "encoder.*=1", "--bits", 6, "--codebook", "int8", "--activations", "int8")
    gq_triton.succeeds("convert", run, *options, "--output", tmp_path / "m")
    quantization = Recognizer.load(tmp_path / "m").quantization
    assert [(pattern, config.bits) for pattern, config in quantization.items()] == [("encoder.*", 1), ("*", 6)]
    assert {(config.codebook, config.activations) for config in quantization.values()} == {("int8", "int8")}


def test_conversions_that_make_no_sense_are_refused(gq_triton, run, qat_run, packed, tmp_path):
    output = ("--output", tmp_path / "m")
    assert "say how many bits" in gq_triton.fails("convert", run, *output)
    for option in (("--bits", 4), ("--layer", "joint=4"), ("--codebook", "int8"), ("--activations", "int8")):
        assert f"{option[0]} does not go with it" in gq_triton.fails("convert", qat_run, *option, *output)
    assert "is packed already" in gq_triton.fails("convert", packed, *output)
    assert not (tmp_path / "m").exists()


def test_evaluation_of_every_stage(gq_triton, run, qat_run, packed, manifest, tmp_path):
    data = ("--data", "manifest", "--root", manifest)
    results = {
        name: gq_triton.json("evaluate", model, *data) for name, model in (("f", run), ("q", qat_run), ("p", packed))
    }
    assert results["q"]["wer"] == results["p"]["wer"]
    for result in results.values():
        assert result["utterances"] == 12
        assert result["interval"][0] <= result["wer"] <= result["interval"][1]
    table = tmp_path / "new" / "h.tsv"
    text = gq_triton.succeeds("evaluate", packed, *data, "--beam", 2, "--hypotheses", table)
    assert text.startswith("WER ")
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    assert rows[0] == ["id", "reference", "hypothesis"]
    assert {row[1] for row in rows[1:]} == {utterance.text for utterance in tones.utterances(12)}


def test_transcription_of_one_file_and_of_several(gq_triton, run, qat_run, packed, manifest):
    files = sorted(manifest.parent.glob("*.flac"))[:2]
    for model in (run, qat_run, packed):
        texts = [
            Recognizer.load(model if model.is_file() else model / "recognizer.safetensors").transcribe(f) for f in files
        ]
        assert gq_triton.succeeds("transcribe", files[0], "--model", model) == texts[0] + "\n"
        several = gq_triton.succeeds("transcribe", *files, "--model", model)
        assert several == "".join(f"{file}: {text}\n" for file, text in zip(files, texts, strict=True))
        rows = gq_triton.json("transcribe", *files, "--model", model)
        assert rows == [{"file": str(file), "text": text} for file, text in zip(files, texts, strict=True)]


def test_what_cannot_be_transcribed_is_named(gq_triton, run, tmp_path):
    assert "nothing.wav" in gq_triton.fails("transcribe", tmp_path / "nothing.wav", "--model", run)
    (tmp_path / "noise.wav").write_bytes(b"no audio at all")
    assert "noise.wav" in gq_triton.fails("transcribe", tmp_path / "noise.wav", "--model", run)
    assert "nowhere" in gq_triton.fails("transcribe", tmp_path / "noise.wav", "--model", tmp_path / "nowhere")
    (tmp_path / "model").write_bytes(b"{" * 100)
    assert "damaged" in gq_triton.fails("transcribe", tmp_path / "noise.wav", "--model", tmp_path / "model")


def test_one_bad_file_does_not_cost_the_others_their_texts(gq_triton, run, manifest, tmp_path):
    recording = min(manifest.parent.glob("*.flac"))
    (tmp_path / "noise.wav").write_bytes(b"no audio at all")
    text = gq_triton.succeeds("transcribe", recording, "--model", run)
    result = gq_triton("transcribe", tmp_path / "noise.wav", recording, "--model", run)
    assert result.exit_code == 1 and "noise.wav" in result.stderr
    assert result.stdout == f"{recording}: {text}"


def test_reports_add_up(gq_triton, run, packed):
    result = gq_triton.json("report", packed)
    assert result["bytes"] == sum(row["bytes"] for row in result["rows"])
    assert result["float32_bytes"] == gq_triton.json("report", run)["bytes"]
    assert f"{result['bytes']:,}" in gq_triton.succeeds("report", packed)
