"""`transcribe --stream` and `--microphone`: what is printed, and when."""

import io
import json
import sys
from queue import SimpleQueue
from types import ModuleType

import pytest
import tones
import torch

from gq_triton.cli import streaming as cli_streaming
from gq_triton.speech.audio import load_audio, save_audio
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.streaming import Endpointing, StreamingRecognizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained recognizer that finds labels in noise."""
    recognizer = tones.recognizer(tones.utterances(4))
    with torch.no_grad():
        for parameter in recognizer.model.parameters():
            parameter.mul_(5)
        recognizer.model.joint.output.bias[0] += 3
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    recognizer.save(path)
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "a.flac"
    draw = torch.Generator().manual_seed(0)
    loudness = torch.sin(torch.arange(48000) / 4000).clamp_min(0)
    save_audio(path, 0.3 * loudness * torch.randn(48000, generator=draw))
    return path


def expected(model, recording, **settings):
    """The results that are to be shown, in order."""
    streaming, wave = StreamingRecognizer(Recognizer.load(model), **settings), load_audio(recording)
    samples = streaming.chunk_ms * 16
    results = [streaming.push(part) for part in wave.split(samples)] + [streaming.finish()]
    parts = [part for result in results for part in (*result.ended, result)]
    before = ["", *("" if part.is_final else part.text for part in parts)]
    return [part for part, text in zip(parts, before, strict=False) if part.is_final or part.text != text]


def test_a_stream_prints_a_line_whenever_its_text_changes(gq_triton, model, recording):
    parts = expected(model, recording)
    assert len(parts) > 3
    lines = [f"{part.end:.2f} s: {part.text}{'' if part.is_final else ' ...'}" for part in parts]
    assert gq_triton.succeeds("transcribe", recording, "--model", model, "--stream").splitlines() == lines
    final = gq_triton.succeeds("transcribe", recording, "--model", model)
    assert lines[-1].endswith(f"s: {final.strip()}")


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {}),
        (("--chunk-ms", 480, "--beam", 2), dict(chunk_ms=480, beam_width=2)),
        (("--endpointing", "--chunk-ms", 80), dict(endpointing=Endpointing(), chunk_ms=80)),
    ],
)
def test_events_as_json_lines(gq_triton, model, recording, options, settings):
    output = gq_triton.succeeds("transcribe", recording, "--model", model, "--stream", "--json", *options)
    events = [json.loads(line) for line in output.splitlines()]
    parts = expected(model, recording, **settings)
    assert [(event["text"], event["is_final"], event["end"]) for event in events] == [
        (part.text, part.is_final, part.end) for part in parts
    ]
    assert set(events[0]) == {"file", "text", "is_final", "ids", "times", "stable", "start", "end"}
    assert events[-1]["file"] == str(recording) and events[-1]["ids"] == list(parts[-1].ids)


def test_a_terminal_shows_one_line_that_grows(model, recording, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    cli_streaming.transcribe_files(StreamingRecognizer(Recognizer.load(model)), [recording], as_json=False)
    shown = terminal.getvalue().split(cli_streaming.ERASE)
    parts = expected(model, recording)
    texts = [part.text if part.is_final else part.text[-19:] for part in parts]
    assert shown == ["", *texts[:-1], texts[-1] + "\n"]


def test_several_files_are_streamed_one_after_the_other(gq_triton, model, recording, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"no audio at all")
    alone = gq_triton.succeeds("transcribe", recording, "--model", model, "--stream")
    result = gq_triton("transcribe", recording, tmp_path / "noise.wav", recording, "--model", model, "--stream")
    assert result.exit_code == 1 and "noise.wav" in result.stderr
    assert result.stdout == 2 * f"{recording}:\n{alone}"


def test_options_that_do_not_go_together_are_refused(gq_triton, model, recording):
    model = ("--model", model)
    assert "either FILES or --microphone" in gq_triton.fails("transcribe", *model)
    assert "either FILES or --microphone" in gq_triton.fails("transcribe", recording, "--microphone", *model)
    for option in (("--chunk-ms", 240), ("--endpointing",)):
        assert "go with --stream or --microphone" in gq_triton.fails("transcribe", recording, *model, *option)
    refused = gq_triton.fails("transcribe", recording, *model, "--stream", "--chunk-ms", 250)
    assert "chunk_ms must be a positive multiple of 80" in refused


class Microphone(ModuleType):
    """A sounddevice that plays a recording into the callback, in blocks of one buffer."""

    class PortAudioError(Exception):
        pass

    def __init__(self, wave):
        super().__init__("sounddevice")
        self.wave = wave

    def InputStream(self, *, samplerate, blocksize, dtype, channels, callback):
        assert (samplerate, dtype, channels) == (16000, "float32", 1)
        self.blocksize, self.callback = blocksize, callback
        return self

    def __enter__(self):
        buffer = torch.zeros(self.blocksize, 1)
        for block in self.wave.split(self.blocksize):
            buffer[:, 0] = block
            self.callback(buffer.numpy(), self.blocksize, None, None)

    def __exit__(self, *_):
        pass


class UntilInterrupted(SimpleQueue):
    """Ctrl-C comes when everything is heard."""

    def get(self):
        if self.empty():
            raise KeyboardInterrupt
        return super().get()


def test_the_microphone_is_transcribed_until_it_is_interrupted(gq_triton, model, recording, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", Microphone(load_audio(recording)))
    monkeypatch.setattr(cli_streaming, "SimpleQueue", UntilInterrupted)
    arguments = ("transcribe", "--microphone", "--model", model)
    assert gq_triton.succeeds(*arguments) == gq_triton.succeeds("transcribe", recording, "--stream", "--model", model)
    event = json.loads(gq_triton.succeeds(*arguments, "--json").splitlines()[-1])
    assert event["text"] == Recognizer.load(model).transcribe(recording) != ""
    assert event["is_final"] and "file" not in event


def test_without_sounddevice_the_extra_is_named(gq_triton, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    said = gq_triton.fails("transcribe", "--microphone", "--model", model)
    assert "pip install 'gq_triton[microphone]'" in said


def test_without_a_microphone_the_error_says_so(gq_triton, model, monkeypatch):
    silent = Microphone(torch.zeros(0))

    def refuse(**_):
        raise silent.PortAudioError("no input device")

    silent.InputStream = refuse
    monkeypatch.setitem(sys.modules, "sounddevice", silent)
    assert "no microphone that records at 16000 Hz: no input device" in gq_triton.fails(
        "transcribe", "--microphone", "--model", model
    )
