import json

import pytest
from torch import nn

import gq_triton as gq

PATTERNS = {
    "z.*": gq.GQConfig(bits=1, mu=2.5, activations="int8", codebook="int8"),
    "a": None,
    "*": gq.GQConfig(bits=5, granularity="tensor"),
    "b": None,
}


def written(path, *patterns, **changes):
    content = {"format": "gq_triton quantization", "version": 1, "patterns": list(patterns), **changes}
    path.write_text(json.dumps(content))
    return path


def test_patterns_come_back_in_order(tmp_path):
    file = tmp_path / "new" / "widths.json"
    gq.save_config(file, PATTERNS)
    assert list(gq.load_config(file).items()) == list(PATTERNS.items())
    gq.save_config(file, gq.GQConfig(bits=2))
    assert gq.load_config(file) == {"*": gq.GQConfig(bits=2)}
    assert [path.name for path in file.parent.iterdir()] == ["widths.json"]


def test_other_methods_come_back(tmp_path):
    config = {"a": gq.baselines.LSQConfig(bits=3), "*": gq.GQConfig()}
    gq.save_config(tmp_path / "widths.json", config)
    assert gq.load_config(tmp_path / "widths.json") == config


def test_order_decides(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    file = written(tmp_path / "by-hand.json", ["0", {"bits": 2}], ["2", None], ["*", {"bits": 6}], ["1", {"bits": 1}])
    gq.quantize_(model, gq.load_config(file))
    assert [row.bits for row in gq.report(model).rows if row.sqnr_db is not None] == [2, 6]


@pytest.mark.parametrize("config", [None, {}, {"a": 4}, {1: gq.GQConfig()}])
def test_what_quantize_would_not_take_is_not_written(tmp_path, config):
    with pytest.raises(ValueError, match="config must"):
        gq.save_config(tmp_path / "widths.json", config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "patterns, changes, message",
    [
        ([], {}, "config must"),
        ([["a", None]], {"format": "gq_triton sensitivity"}, "its 'format' must be 'gq_triton quantization'"),
        ([["a", None]], {"version": 2}, "its 'version' is 2; this program reads 1"),
        ([], {"patterns": {"a": None}}, "must be a list of \\[pattern, settings or null\\]"),
        ([["a"]], {}, "must be a list of"),
        ([["a", None], ["a", {"bits": 3}]], {}, "texts, each once; got 'a'"),
        ([[1, None]], {}, "texts, each once; got 1"),
        ([["a", {"bits": 9}]], {}, "settings for 'a' are invalid: bits must be an integer from 1 to 8; got 9"),
        ([["a", {"bitz": 4}]], {}, "settings for 'a' are invalid: settings has unknown names \\['bitz'\\]"),
        ([["a", {"method": "magic"}]], {}, "settings for 'a' are invalid: method must be one of"),
        ([["a", {"method": []}]], {}, "settings for 'a' are invalid"),
        ([["a", 4]], {}, "settings for 'a' are invalid: settings must be a mapping"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, patterns, changes, message):
    file = written(tmp_path / "widths.json", *patterns, **changes)
    with pytest.raises(ValueError, match=message) as error:
        gq.load_config(file)
    assert str(error.value).startswith(f"{file} says nothing valid of how to quantize: ")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"4", b'{"format"', b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "widths.json").write_bytes(content)
    with pytest.raises(ValueError, match="widths.json says nothing valid"):
        gq.load_config(tmp_path / "widths.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="widths.json does not exist"):
        gq.load_config(tmp_path / "widths.json")
