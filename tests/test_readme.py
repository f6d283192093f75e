"""The README says what the records say."""

import re

from scripts import ROOT, load_script


def test_tables_are_those_of_the_records():
    readme = load_script("plots/readme.py")
    text = (ROOT / "README.md").read_text()
    assert readme.TABLE.search(text)
    assert readme.filled(text) == text, "run `python plots/readme.py`"


def test_files_that_the_readme_shows_exist():
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert shown
    assert [path for path in shown if not (ROOT / path).is_file()] == []
