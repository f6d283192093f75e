import json
from pathlib import Path

import pytest
import tones
from click.testing import CliRunner, Result

from gq_triton.cli.main import main


class CommandLine:
    """Runs `gq-triton` in this process."""

    def __call__(self, *arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    def succeeds(self, *arguments: object) -> str:
        result = self(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *arguments: object) -> dict:
        return json.loads(self.succeeds(*arguments, "--json"))

    def fails(self, *arguments: object) -> str:
        """What a failing command says; a traceback is no way to say it."""
        result = self(*arguments)
        assert result.exit_code in (1, 2), result.output
        assert isinstance(result.exception, SystemExit)
        return result.stderr


@pytest.fixture(scope="session")
def gq_triton() -> CommandLine:
    return CommandLine()


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    return tones.write_manifest(tmp_path_factory.mktemp("tones"), tones.utterances(12))


@pytest.fixture(scope="session")
def run(gq_triton, manifest, tmp_path_factory) -> Path:
    """The folder of a float recognizer, trained for one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "float"
    data = ("--data", "manifest", "--root", manifest)
    small = ("--preset", "tiny", "--tokenizer", "word", "--set", "epochs=1", "--set", "speeds=1")
    gq_triton.succeeds("train", *data, *small, "--output", folder)
    return folder


@pytest.fixture(scope="session")
def qat_run(gq_triton, manifest, run, tmp_path_factory) -> Path:
    """The folder of a prepared recognizer, trained for one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "qat"
    data = ("--data", "manifest", "--root", manifest, "--set", "epochs=1", "--set", "speeds=1")
    gq_triton.succeeds("qat", run, "--layer", "joint.output=float", "--bits", 3, *data, "--output", folder)
    return folder
