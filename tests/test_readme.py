"""The README says what the records say."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_records():
    readme = load_script(ROOT / "plots" / "readme.py")
    text = (ROOT / "README.md").read_text()
    assert readme.TABLE.search(text)
    assert readme.filled(text) == text, "run `python plots/readme.py`"


def test_files_that_the_readme_shows_exist():
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert shown
    assert [path for path in shown if not (ROOT / path).is_file()] == []
