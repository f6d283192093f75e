import json

import pytest
import torch
from safetensors.torch import save_file

from gq_triton.files import load_tensors, read_state, save_json, save_json_lines, save_tensors, write_atomically


def test_tensors_and_state_come_back_bit_for_bit(tmp_path):
    tensors = {
        "float": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "codes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
    }
    save_tensors(tmp_path / "new" / "file.safetensors", tensors, {"step": 3, "name": "ä"})
    loaded, state = load_tensors(tmp_path / "new" / "file.safetensors")
    assert state == {"step": 3, "name": "ä"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_tensors_that_share_memory_are_each_stored(tmp_path):
    whole = torch.arange(6.0)
    save_tensors(tmp_path / "f", {"whole": whole, "part": whole[::2], "again": whole}, {})
    loaded, _ = load_tensors(tmp_path / "f")
    assert torch.equal(loaded["part"], torch.tensor([0.0, 2.0, 4.0]))
    assert torch.equal(loaded["again"], whole)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_safetensors_cannot_write_is_an_operating_system_error(tmp_path):
    def write(temporary):
        temporary.parent.rmdir()
        save_file({"a": torch.ones(2)}, temporary)

    with pytest.raises(OSError, match="file cannot be written"):
        write_atomically(tmp_path / "gone" / "file", write)


def test_others_may_read_what_they_may_read_of_any_file(tmp_path):
    (tmp_path / "plain").write_text("")
    save_tensors(tmp_path / "tensors", {"a": torch.ones(2)}, {})
    save_json(tmp_path / "json", {})
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_json_is_written_for_people(tmp_path):
    save_json(tmp_path / "a.json", {"b": [1, 2]})
    assert (tmp_path / "a.json").read_text().startswith('{\n  "b"')


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors does not exist"):
        read_state(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 60, -3])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "file"
    save_tensors(path, {"a": torch.ones(100)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged"):
        load_tensors(path)


@pytest.mark.parametrize("metadata", [None, {"other": "x"}, {"state": "{"}, {"state": "[1]"}])
def test_a_file_of_another_kind_is_refused(tmp_path, metadata):
    save_file({"a": torch.ones(2)}, tmp_path / "file", metadata=metadata)
    with pytest.raises(ValueError, match="file"):
        load_tensors(tmp_path / "file")


def test_rows_are_lines(tmp_path):
    rows = [{"a": 1, "b": [1, 2]}, {"a": "two\nlines"}]
    save_json_lines(tmp_path / "new" / "rows.jsonl", iter(rows))
    assert [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()] == rows
