"""Which settings for which layers, as a file.

A file is JSON: ``{"format": "gq_triton quantization", "version": 1, "patterns": [[PATTERN, SETTINGS], ...]}``. The
patterns are those that :func:`gq_triton.quantize_` takes, in pairs, because the first one that matches wins; settings
are what the configuration's ``to_dict`` returns, such as ``{"bits": 4}`` for a :class:`gq_triton.GQConfig`, where what
is missing takes its default, or null for layers that stay float. Other methods' settings name their "method".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gq_triton.config import WeightConfig, config_from_dict
from gq_triton.files import save_json
from gq_triton.quantize import patterns_of

__all__ = ["load_config", "save_config"]

FORMAT, VERSION = "gq_triton quantization", 1


def save_config(path: str | Path, config: WeightConfig | Mapping[str, WeightConfig | None]) -> None:
    """Writes what :func:`gq_triton.quantize_` takes for ``config`` to a file, atomically.

    Raises:
        ValueError: ``config`` is something else.
        OSError: the file cannot be written.
    """
    patterns = [[pattern, each and each.to_dict()] for pattern, each in patterns_of(config).items()]
    save_json(path, {"format": FORMAT, "version": VERSION, "patterns": patterns})


def load_config(path: str | Path) -> dict[str, WeightConfig | None]:
    """Reads what :func:`save_config` wrote, or a person.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind or version, or damaged, or a setting in it is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} says nothing valid of how to quantize: {error}") from error


def _parse(content: object) -> dict[str, WeightConfig | None]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"its 'format' must be {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"its 'version' is {content.get('version')!r}; this program reads {VERSION}")
    pairs = content.get("patterns")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("its 'patterns' must be a list of [pattern, settings or null]")
    patterns: dict[str, WeightConfig | None] = {}
    for pattern, settings in pairs:
        if not isinstance(pattern, str) or pattern in patterns:
            raise ValueError(f"its patterns must be texts, each once; got {pattern!r}")
        patterns[pattern] = _settings(pattern, settings)
    return patterns_of(patterns)


def _settings(pattern: str, settings: object) -> WeightConfig | None:
    try:
        return None if settings is None else config_from_dict(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its settings for {pattern!r} are invalid: {error}") from error
