"""Writes the README's tables from committed records, so that no figure in it is typed by hand.

    python plots/readme.py

Fills what lies between `<!-- table RECORD -->` and `<!-- end -->`, RECORD being a path of a record of
benchmarks/recognition.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from gq_triton.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite the README."""
    readme = ROOT / "README.md"
    text = filled(readme.read_text())
    write_atomically(readme, lambda temporary: temporary.write_text(text))


def filled(text: str) -> str:
    """The text with every table drawn anew."""
    return TABLE.sub(lambda match: match[1] + recognition_table(ROOT / match[2]) + match[3], text)


def recognition_table(path: Path) -> str:
    """A record as a Markdown table, with what it was measured on below it."""
    record = json.loads(path.read_text())
    float_model, test = record["float"], record["test"]
    lines = [
        "| weights | WER, post-training quantization | WER, GQ training | bytes | times smaller |",
        "| --- | --- | --- | --- | --- |",
        f"| float32 | | {_percent(float_model['wer'], float_model['interval'])} | {float_model['bytes']:,} | 1.0 |",
    ]
    for row in record["rows"]:
        untrained = _percent(row["ptq_wer"], row["ptq_interval"])
        trained = _percent(row["qat_wer"], row["qat_interval"])
        lines.append(f"| {row['name']} | {untrained} | {trained} | {row['bytes']:,} | {row['ratio']:.1f} |")
    about = (
        f"{test['utterances']} utterances, {test['words']} words; 95 % bootstrap intervals over speakers; "
        f"{record['decoding']} decoding of packed weights; {record['device']}, torch {record['versions']['torch']}, "
        f"{record['date']}."
    )
    return "\n".join([*lines, "", about, ""])


def _percent(rate: float, interval: list[float]) -> str:
    low, high = (100 * end for end in interval)
    return f"{100 * rate:.1f} % ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
