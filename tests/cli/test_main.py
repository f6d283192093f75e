import json
import shutil
import subprocess

import click
import pytest
import torch

import gq_triton as package
from gq_triton.cli.info import commit
from gq_triton.cli.main import main


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found += [(*path, name)] + (commands(command, (*path, name)) if isinstance(command, click.Group) else [])
    return found


def test_the_commands_are_there():
    expected = {"quickstart", "train", "allocate", "qat", "evaluate", "convert", "transcribe", "report", "data"}
    assert set(main.commands) == expected | {"reproduce", "info", "tune"}


@pytest.mark.parametrize("path", commands(main), ids=" ".join)
def test_every_command_explains_itself(gq_triton, path):
    text = gq_triton.succeeds(*path, "--help")
    assert text.startswith("Usage: gq-triton " + " ".join(path))
    command = main
    for name in path:
        command = command.commands[name]
    assert command.help
    undocumented = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert not undocumented


def test_info_says_what_is_installed(gq_triton):
    result = gq_triton.json("info")
    assert result["versions"]["gq_triton"] == package.__version__
    assert result["versions"]["torch"] == torch.__version__
    assert result["device"]
    assert f"gq_triton        {package.__version__}" in gq_triton.succeeds("info")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_of_this_project(monkeypatch, tmp_path):
    """Not of one whose checkout holds the environment that this package is installed in."""
    package_file = tmp_path / ".venv" / "gq_triton" / "__init__.py"
    package_file.parent.mkdir(parents=True)
    shutil.copy(package.__file__, package_file)
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "other"], check=True)
    monkeypatch.setattr(package, "__file__", str(package_file))
    assert commit() is None
    subprocess.run([*git, "add", str(package_file)], check=True)
    assert commit().endswith("+changes")


def test_the_version(gq_triton):
    assert package.__version__ in gq_triton.succeeds("--version")


def test_a_traceback_is_shown_on_request(gq_triton, tmp_path):
    result = gq_triton("--traceback", "report", tmp_path / "nothing")
    assert isinstance(result.exception, FileNotFoundError)
    assert "Traceback" not in gq_triton.fails("report", tmp_path / "nothing")


def test_json_stands_alone_on_standard_output(gq_triton, run, manifest):
    result = gq_triton("evaluate", run, "--data", "manifest", "--root", manifest, "--json")
    assert json.loads(result.stdout)["utterances"] == 12
