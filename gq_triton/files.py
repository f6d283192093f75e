"""Files that are written whole or not at all: tensors and JSON in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["load_tensors", "read_state", "save_json", "save_json_lines", "save_tensors", "write_atomically"]


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then moves it there: readers never see half a file.

    Parent folders are made. The data is on disk before the move, so that a crash leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner reads
        os.replace(temporary, path)
    except SafetensorError as error:  # what safetensors makes of a full disk or a folder that may not be written to
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def save_json(path: str | Path, value: object) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def save_json_lines(path: str | Path, rows: Iterable[object]) -> None:
    """Writes each of ``rows`` as a line of JSON, atomically."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], state: dict) -> None:
    """Writes tensors, and a JSON-able ``state`` in the file's metadata, as one safetensors file, atomically."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(copies, temporary, metadata={"state": json.dumps(state)}))


def load_tensors(path: str | Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict]:
    """Reads what :func:`save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not of this kind.
    """
    state = read_state(path)
    with safe_open(path, framework="pt", device=device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118


def read_state(path: str | Path) -> dict:
    """The JSON state of a file that :func:`save_tensors` wrote; raises as :func:`load_tensors` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of this program, or it is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds {type(state).__name__} where its description belongs")
    return state
