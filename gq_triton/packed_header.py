"""What a packed file says of its weights; the format is in :mod:`gq_triton.packed_file`.

No torch here: programs that run a packed model without it read this too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gq_triton.config import WeightConfig, config_from_dict

__all__ = ["KEY", "RECOGNIZER_FORMAT", "VERSION", "Header", "some"]

KEY = "gq_triton"
RECOGNIZER_FORMAT = "gq_triton.recognizer.1"  # which a recognizer's description names
VERSION = 1


@dataclass(frozen=True)
class Header:
    """Packed weights by name, and shared tensors.

    Attributes:
        configs: the settings of each weight.
        sqnr_db: what is said of each weight's signal to quantization noise ratio: anything that JSON holds.
        aliases: for each other name of a shared tensor, the name under which it is stored.
    """

    configs: dict[str, WeightConfig]
    sqnr_db: dict[str, Any]
    aliases: dict[str, str]

    @classmethod
    def read(cls, metadata: Mapping[str, str] | None, names: Collection[str]) -> Header:
        """Reads and checks a file's metadata; ``names`` are those of the stored tensors.

        Raises:
            ValueError: it is not that of a packed model, or of another version, or damaged.
        """
        text = (metadata or {}).get(KEY)
        if text is None:
            raise ValueError(f"it is not a packed model: its metadata has no {KEY!r} entry")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its {KEY!r} entry is not valid JSON") from error
        if not isinstance(header, dict) or header.get("version") != VERSION:
            version = header.get("version") if isinstance(header, dict) else None
            raise ValueError(f"its format has version {version!r}; this program reads version {VERSION}")
        weights, aliases = header.get("weights"), header.get("aliases")
        if not isinstance(weights, dict) or not all(isinstance(entry, dict) for entry in weights.values()):
            raise ValueError("its 'weights' must map names to settings")
        if not isinstance(aliases, dict) or not all(isinstance(stored, str) for stored in aliases.values()):
            raise ValueError("its 'aliases' must map names to names")
        stored = set(names)
        if not stored.issuperset(aliases.values()) or not stored.isdisjoint(aliases):
            raise ValueError("its 'aliases' must map names that are not stored to names that are")
        configs = {name: _config(name, entry.get("config")) for name, entry in weights.items()}
        return cls(configs, {name: entry.get("sqnr_db") for name, entry in weights.items()}, aliases)

    def stored(self, name: str) -> str:
        """Returns the name under which a tensor is stored."""
        return self.aliases.get(name, name)

    def owner(self, weight: str) -> str:
        """Returns the packed weight that ``weight`` is, itself unless it is shared.

        Raises:
            ValueError: if its buffers are said to be shared with anything else than one weight of the same settings.
        """
        buffers = ("codes", "codebook", "scale")
        owners = {self.stored(f"{weight}_packed.{buffer}").removesuffix(f"_packed.{buffer}") for buffer in buffers}
        owner = owners.pop()
        if owners or self.configs.get(owner) != self.configs[weight]:
            raise ValueError(f"{weight} is shared with something that is not the same packed weight")
        return owner


def _config(name: str, settings: Any) -> WeightConfig:
    try:
        return config_from_dict(settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"its settings of {name} are invalid: {error}") from error


def some(names: Iterable[str]) -> str:
    """A few of the names, for a message."""
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
