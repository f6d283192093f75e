"""The programs of `examples/` run, with few steps, and on checkpoints and recordings as users have them."""

import re
import sys

import pytest
import torch
from scripts import load_script

import gq_triton as gq
from gq_triton.speech.audio import save_audio


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example's command; returns what it prints and the packed model's file."""

    def command(name, *arguments):
        file = tmp_path / "model.safetensors"
        script = load_script(f"examples/{name}.py")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--output", str(file)])
        script.main()
        return capsys.readouterr().out, file

    return command


def saved(model, processor, folder):
    for each in (model, processor):
        each.save_pretrained(folder)
    return folder


def test_a_model_of_ones_own(run):
    printed, file = run("own_lstm", "--steps", 2)
    assert len(re.findall(r"^errors, .*: \d+\.\d%$", printed, re.MULTILINE)) == 3
    assert "times smaller" in printed
    model = load_script("examples/own_lstm.py").KeywordSpotter()
    assert gq.load_packed(model, file)(torch.randn(2, 40, 20)).shape == (2, 12)


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[external]'")


def test_whisper(run, transformers):
    printed, file = run("whisper_post_training", "--bits", 3)
    assert re.search(r"^3 bits: \d\.\d\d times smaller, \d+\.\d dB, \d+% of tokens alike; \[", printed, re.MULTILINE)
    model = gq.load_packed(load_script("examples/whisper_post_training.py").random_model(), file)
    assert {row.bits for row in gq.report(model).rows} == {3, 32}
    with pytest.raises(SystemExit):
        run("whisper_post_training", "--audio", "talk.wav")


def test_a_checkpoint_of_whisper(run, transformers, tmp_path):
    vocabulary = {chr(i): i for i in range(33, 127)} | {"<|endoftext|>": 0}
    tokenizer = transformers.WhisperTokenizer(vocabulary, [])
    features = transformers.WhisperFeatureExtractor(chunk_length=2)
    model = load_script("examples/whisper_post_training.py").random_model()
    folder = saved(model, transformers.WhisperProcessor(features, tokenizer), tmp_path / "checkpoint")
    save_audio(tmp_path / "talk.wav", 0.1 * torch.randn(20000))
    printed, _ = run("whisper_post_training", "--model", folder, "--audio", tmp_path / "talk.wav", "--bits", 8)
    assert printed.startswith("float: ") and "8 bits: " in printed


def test_a_wav2vec2_conformer(run, transformers, tmp_path):
    printed, _ = run("wav2vec2_conformer", "--steps", 1)
    kinds = re.findall(r"^(.*): \d+\.\d% of letters wrong", printed, re.MULTILINE)
    assert kinds == ["float", "quantized", "trained and packed"]
    script = load_script("examples/wav2vec2_conformer.py")
    folder, audio = saved(*script.random_model(), tmp_path / "checkpoint"), tmp_path / "audio"
    audio.mkdir()
    for index, (wave, text) in enumerate(script.tones()[:3]):
        save_audio(audio / f"{index}.wav", torch.from_numpy(wave))
        (audio / f"{index}.txt").write_text(f"{text}\n")
    printed, _ = run("wav2vec2_conformer", "--steps", 1, "--model", folder, "--audio", audio)
    assert printed.count("of letters wrong") == 3 and printed.count(f"for {script.tones()[0][1]!r}") == 3
