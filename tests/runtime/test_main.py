import numpy as np
import pytest

from gq_triton.runtime.__main__ import main
from gq_triton.speech.audio import save_audio

pytestmark = pytest.mark.usefixtures("needs_native")


@pytest.fixture
def recordings(spoken, tmp_path):
    paths = [str(tmp_path / f"{index}.wav") for index in range(2)]
    for path, utterance in zip(paths, spoken, strict=False):
        save_audio(path, utterance.load())
    return paths


def test_one_file_is_one_line(packed, recordings, capsys):
    assert main([str(packed[0]), recordings[0]]) == 0
    assert capsys.readouterr().out == packed[1].transcribe(recordings[0]) + "\n"


def test_lines_of_several_files_are_named(packed, recordings, capsys):
    assert main([str(packed[0]), *recordings, "--threads", "2"]) == 0
    assert capsys.readouterr().out == "".join(f"{path}: {packed[1].transcribe(path)}\n" for path in recordings)


def test_a_stream_shows_the_text_as_it_grows(packed, recordings, capsys):
    assert main([str(packed[0]), "--stream", "--chunk-ms", "80", *recordings]) == 0
    lines = capsys.readouterr().out.splitlines()
    finals = [line for line in lines if line.startswith(tuple(recordings))]
    assert finals == [f"{path}: {packed[1].transcribe(path)}" for path in recordings]
    growing = [line for line in lines if " s  " in line]
    assert len(growing) >= 4
    assert np.all(np.diff([float(line.split()[0]) for line in growing[: lines.index(finals[0])]]) > 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{model}", "nowhere.wav"], "nowhere.wav is not a file"),
        (["nowhere", "{wav}"], "nowhere is not a file"),
        (["{wav}", "{wav}"], "cannot be loaded"),
        (["{model}", "{model}"], "is not a WAV file"),
        (["{model}", "{wav}", "--threads", "0"], "threads must be at least 1"),
        (["{model}", "{wav}", "--stream", "--chunk-ms", "7"], "chunk_ms must be a positive multiple of 80"),
    ],
)
def test_errors_are_one_line(arguments, message, packed, recordings, capsys):
    assert main([argument.format(model=packed[0], wav=recordings[0]) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1


def test_arguments_that_are_missing_are_explained(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "MODEL" in capsys.readouterr().err
