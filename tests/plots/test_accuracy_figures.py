"""The figures of studies, drawn from invented results of their rows."""

import json

import pytest
import style
from matplotlib.image import imread
from scripts import load_script

from gq_triton.studies import LONGER, summarize
from gq_triton.studies.an4 import STUDIES

SPEAKERS, WORDS = 5, 50
ARROWS = {r"$\uparrow$": 1, r"$\downarrow$": -1}


def result(cell):
    """Invented: the fewer bits, the more errors; nothing but errors at one bit without training."""
    variant = cell.variant
    widths = [config.bits for config in (variant.allocation or {}).values()]
    bits = sum(widths) / len(widths) if widths else 32.0
    lost = 0 if not widths else 12 // bits if variant.trained else 45 // bits
    lost -= variant == LONGER
    errors = [1 + index + int(lost) for index in range(SPEAKERS)]
    speakers = {f"{cell.fold}-{index}": [count, WORDS, count, 5 * WORDS] for index, count in enumerate(errors)}
    part = {"speakers": speakers, "loss_per_token": 0.1 + len(variant.name) ** 3 / 1e5}
    names = {"fold": cell.fold, "variant": variant.name, "group": variant.group, "reference": variant.reference}
    sizes = {"bits": bits, "bytes": int(1000 * bits), "float32_bytes": 32000, "seconds": 60.0}
    return {**names, **sizes, "held_out": part, "test": part}


def record(study, incomplete=()):
    """As `gq-triton reproduce` writes it; ``incomplete`` rows lack the last fold."""
    design = STUDIES[study]
    last = list(design.measured)[-1]
    results = [result(cell) for cell in design.cells() if cell.variant.name not in incomplete or cell.fold != last]
    environment = {"device": "an invented device", "versions": {"torch": "2.0"}}
    head = {"study": study, "question": design.question, "margin": design.margin, "date": "2026-01-01"}
    lines = [line.to_dict() for line in summarize(results, design.margin)]
    return json.loads(json.dumps({**head, "environment": environment, "lines": lines}))


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draws, by a program, what is returned once it is a file, too."""

    def draw(program, record):
        kept, save = [], style.save
        monkeypatch.setattr(style, "save", lambda made, path: (kept.append(made), save(made, path)))
        load_script(program).draw(record, tmp_path / "figure.png")
        assert imread(tmp_path / "figure.png").shape[1] == 150 * kept[0].get_figwidth()
        return kept[0]

    return draw


def series(axes):
    """Places and values of what has a name in the legend."""
    return {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}


def arrows(axes):
    return [(line.get_xdata()[0], ARROWS[line.get_marker()]) for line in axes.lines if line.get_marker() in ARROWS]


def test_methods_are_drawn_against_bits(figure):
    rates, differences = figure("plots/accuracy.py", record("an4-rnnt")).axes
    drawn = series(rates)
    groups = {variant.group for variant in STUDIES["an4-rnnt"].variants}
    assert drawn.keys() == groups - {"torchao"} | {"float32", "float32, trained on"}
    assert {len(drawn[name]) for name in ("GQ", "LSQ", "GQ post-training")} == {6}
    assert drawn["GQ"][:, 1].tolist() == pytest.approx([30, 18, 14, 12, 10, 8])  # of 50 words 3 + 12 // bits, in %
    lines = {line.get_label(): line for line in rates.lines}
    assert lines["float32, trained on"].get_linestyle() != lines["float32"].get_linestyle()
    assert len(differences.containers) == len(groups) - 1


def test_what_is_beyond_the_axes_is_an_arrow(figure):
    found = record("an4-rnnt")
    (better,) = [line for line in found["lines"] if line["variant"] == "GQ, 8 bits"]
    better["difference"] = {"value": -0.1, "interval": [-0.1, -0.1], "tested": [-0.1, -0.1]}
    rates, differences = figure("plots/accuracy.py", found).axes
    assert [(round(bits), way) for bits, way in arrows(rates)] == [(1, 1), (2, 1)] * 3  # without training
    ways = [way for bits, way in arrows(differences) if round(bits) == 8]
    assert ways == [-1]
    low, high = differences.get_ylim()
    values = [value for bars in differences.containers for value in bars.lines[0].get_ydata()]
    assert len(arrows(differences)) == sum(not low <= value <= high for value in values)


def test_rows_of_fewer_folds_are_left_out(figure):
    missing = ["LSQ, 1 bit", "LSQ, 2 bits", "float32, trained on", "torchao, linear layers, 4 bits"]
    made = figure("plots/accuracy.py", record("an4-rnnt", incomplete=missing))
    drawn = series(made.axes[0])
    assert "float32, trained on" not in drawn
    assert (len(drawn["LSQ"]), len(drawn["GQ"])) == (4, 6)
    assert "left out as incomplete: 3 rows\n" in made.get_suptitle()  # torchao has no place in it anyway


def test_changes_are_drawn_against_the_default_of_their_width(figure):
    found = record("an4-ablation")
    made = figure("plots/ablation.py", found)
    losses = {line["variant"]: line["loss"] for line in found["lines"]}
    names = [label.get_text() for label in made.axes[0].get_yticklabels()]
    assert names[:2] == ["soft forward", "straight-through 0"]
    assert [axes.get_title().split(":")[0] for axes in made.axes] == ["4 bits", "2 bits", "1 bit"]
    for axes, bits in zip(made.axes, ("4 bits", "2 bits", "1 bit"), strict=True):
        points = {names[int(place)]: value for value, place in axes.lines[0].get_xydata()}
        default = losses.pop(f"{bits}, as by default")
        own = {name.removeprefix(f"{bits}, "): loss - default for name, loss in losses.items() if name.startswith(bits)}
        assert points == pytest.approx(own)


def test_incomplete_changes_are_left_out(figure):
    found = record("an4-ablation")
    for line in found["lines"]:
        line["folds"] = 1 if line["variant"] in ("2 bits, mu 15", "1 bit, as by default") else 2
    made = figure("plots/ablation.py", found)
    assert [axes.get_title().split(":")[0] for axes in made.axes] == ["4 bits", "2 bits"]
    four, two = (len(axes.lines[0].get_xdata()) for axes in made.axes)
    assert two == four - 1
    undrawn = 1 + sum(line["variant"].startswith("1 bit") for line in found["lines"])  # nothing to compare these with
    assert f"2 folds; left out as incomplete: {undrawn} rows\n" in made.get_suptitle()


@pytest.mark.parametrize(
    "program, other, message",
    [
        ("plots/accuracy.py", "an4-ablation", "an4-ablation has no row of GQ, LSQ, .*see plots/ablation.py"),
        ("plots/ablation.py", "an4-rnnt", "an4-rnnt has no complete row 'as by default'; see plots/accuracy.py"),
    ],
)
def test_each_study_has_its_figure(figure, program, other, message):
    with pytest.raises(ValueError, match=message):
        figure(program, record(other))
