"""Sizes of the reference recognizers. No torch here: programs that run a packed model without it read this too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

__all__ = [
    "CONFORMER_PRESETS",
    "PRESETS",
    "RNNT_PRESETS",
    "ConformerConfig",
    "RNNTConfig",
    "TransducerConfig",
    "architecture_of",
    "config_from_dict",
    "preset",
]

Config = TypeVar("Config", bound="TransducerConfig")


@dataclass(frozen=True)
class TransducerConfig:
    """What transducers of every encoder have.

    Attributes:
        vocab_size: labels including the blank, which is id 0.
        features: values per input frame.
        predictor_embedding, predictor_hidden, predictor_layers: the label LSTM; 0 layers for none, which makes it a
            :class:`~gq_triton.models.CTC` model and no transducer.
        joint: width of the joint network.
        dropout: probability, after the encoder's layers and the predictor's.
    """

    architecture: ClassVar[str]
    presets: ClassVar[dict[str, dict]]
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"dropout", "predictor_layers"})

    vocab_size: int
    features: int = 80
    predictor_embedding: int = 64
    predictor_hidden: int = 128
    predictor_layers: int = 1
    joint: int = 256
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), (int, float) if field.name == "dropout" else int
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{field.name} is {value!r}; a number is needed, whole but for dropout")
            if not value >= 0 or (value == 0 and field.name not in self.may_be_zero):
                raise ValueError(f"{field.name} is {value}; a positive number is needed")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; the blank and at least one label are needed")
        if self.dropout >= 1:
            raise ValueError(f"dropout is {self.dropout}; allowed: 0 <= dropout < 1")

    @classmethod
    def preset(cls: type[Config], name: str, vocab_size: int, **changes: float) -> Config:
        """One of the architecture's presets for a vocabulary, with fields changed by keyword."""
        if name not in cls.presets:
            raise ValueError(f"preset is {name!r}; allowed: {', '.join(cls.presets)}")
        return cls(**{"vocab_size": vocab_size, **cls.presets[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """The sizes and the ``architecture``, JSON-able; :func:`config_from_dict` reads them."""
        return {"architecture": self.architecture, **asdict(self)}

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`; raises ValueError on unknown fields or another architecture."""
        values = dict(values)
        found = values.pop("architecture", None)
        if found != cls.architecture:
            raise ValueError(f"the model's architecture is {found!r}; {cls.architecture!r} is needed")
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
        return cls(**values)


#: ``tiny`` for the quickstart, ``small`` for AN4 (about 2.8 M parameters), ``base`` the size class of on-device
#: recognizers (about 60 M), ``bifocal`` of the same size: 43 M in the large encoder and 7 M in the small one.
RNNT_PRESETS: dict[str, dict] = {
    "tiny": dict(
        encoder_layers=2,
        encoder_hidden=128,
        predictor_embedding=32,
        predictor_hidden=64,
        joint=96,
        dropout=0.1,
    ),
    "small": dict(
        stack=3,
        encoder_layers=3,
        encoder_hidden=320,
        predictor_embedding=64,
        predictor_hidden=128,
        joint=256,
        dropout=0.25,
    ),
    "base": dict(
        stack=3,
        encoder_layers=6,
        encoder_hidden=1024,
        reduce_after=2,
        predictor_embedding=256,
        predictor_hidden=768,
        predictor_layers=2,
        joint=640,
        dropout=0.1,
    ),
    "bifocal": dict(
        stack=3,
        encoder_layers=5,
        encoder_hidden=1024,
        reduce_after=2,
        small_encoder_layers=3,
        small_encoder_hidden=512,
        predictor_embedding=256,
        predictor_hidden=768,
        predictor_layers=2,
        joint=640,
        dropout=0.1,
    ),
}


@dataclass(frozen=True)
class RNNTConfig(TransducerConfig):
    """Sizes of an :class:`~gq_triton.models.RNNT` with recurrent encoders, beside those of every transducer.

    Attributes:
        stack: input frames joined into one encoder frame; the first time reduction.
        encoder_layers, encoder_hidden: unidirectional LSTM layers and their width.
        encoder_projection: width of each LSTM's output projection, below ``encoder_hidden``; 0 for none.
        reduce_after: layers after which pairs of frames are joined, the second time reduction; 0 for none.
        small_encoder_layers, small_encoder_hidden: those of a second, small encoder for the wake word, which makes it a
            Bifocal RNN-T (see :class:`~gq_triton.models.rnnt.BifocalEncoder`); 0 and 0 for none.
    """

    architecture, presets = "rnnt", RNNT_PRESETS
    may_be_zero = TransducerConfig.may_be_zero | {
        "encoder_projection",
        "reduce_after",
        "small_encoder_layers",
        "small_encoder_hidden",
    }

    stack: int = 4
    encoder_layers: int = 3
    encoder_hidden: int = 320
    encoder_projection: int = 0
    reduce_after: int = 1
    small_encoder_layers: int = 0
    small_encoder_hidden: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.small_encoder_layers == 0) != (self.small_encoder_hidden == 0):
            raise ValueError(
                f"small_encoder_layers is {self.small_encoder_layers} and small_encoder_hidden is "
                f"{self.small_encoder_hidden}; both or neither must be 0"
            )
        layers = min(self.encoder_layers, self.small_encoder_layers or self.encoder_layers)
        if self.reduce_after >= layers:
            raise ValueError(f"reduce_after is {self.reduce_after}; allowed: 0..{layers - 1}")
        if self.encoder_projection >= self.encoder_hidden:
            raise ValueError(f"encoder_projection is {self.encoder_projection}; allowed: 0..{self.encoder_hidden - 1}")

    def of_small_encoder(self) -> RNNTConfig:
        """What :class:`~gq_triton.models.rnnt.Encoder` makes the small encoder of."""
        return replace(
            self,
            encoder_layers=self.small_encoder_layers,
            encoder_hidden=self.small_encoder_hidden,
            encoder_projection=0,
            small_encoder_layers=0,
            small_encoder_hidden=0,
        )

    @property
    def subsampling(self) -> int:
        """Input frames per encoder output frame."""
        return self.stack * (2 if self.reduce_after else 1)

    @property
    def layers(self) -> int:
        """Of all kinds."""
        return self.encoder_layers + self.small_encoder_layers + self.predictor_layers


#: ``tiny`` for experiments, ``S`` and ``M`` of the published sizes (about 10 M and 30 M parameters).
CONFORMER_PRESETS: dict[str, dict] = {
    "tiny": dict(
        channels=32,
        encoder_layers=3,
        encoder_size=128,
        predictor_embedding=32,
        predictor_hidden=64,
        joint=96,
    ),
    "S": dict(
        channels=144,
        encoder_layers=16,
        encoder_size=144,
        predictor_embedding=160,
        predictor_hidden=320,
        joint=320,
    ),
    "M": dict(
        channels=256,
        encoder_layers=16,
        encoder_size=256,
        predictor_embedding=320,
        predictor_hidden=640,
        joint=640,
    ),
}


@dataclass(frozen=True)
class ConformerConfig(TransducerConfig):
    """Sizes of an :class:`~gq_triton.models.RNNT` with a Conformer encoder, beside those of every transducer.

    Attributes:
        channels: of the two convolutions that join four input frames into an encoder frame.
        encoder_layers, encoder_size: blocks and their width.
        heads: of the attention; they divide ``encoder_size``.
        kernel: encoder frames that the depthwise convolutions see, up to the present one.
        chunk: encoder frames of a chunk, in which each attends to all; what it says waits for the chunk's end.
        left: encoder frames before the chunk that each attends to.

    ``left`` and ``chunk`` are at most 10,000 frames, minutes: they alone decide how much memory a stream takes.
    """

    architecture, presets = "conformer", CONFORMER_PRESETS

    channels: int = 144
    encoder_layers: int = 16
    encoder_size: int = 144
    heads: int = 4
    kernel: int = 15
    chunk: int = 6
    left: int = 48
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.left, self.chunk) > 10_000:
            raise ValueError(f"left is {self.left} and chunk is {self.chunk}; at most 10,000 frames are allowed")
        if self.encoder_size % (2 * self.heads):
            raise ValueError(
                f"encoder_size is {self.encoder_size} with heads {self.heads}; a multiple of {2 * self.heads} is needed"
            )

    @property
    def subsampling(self) -> int:
        """Input frames per encoder output frame."""
        return 4

    @property
    def layers(self) -> int:
        """Of all kinds."""
        return self.encoder_layers + self.predictor_layers


def preset(name: str, vocab_size: int, **changes: float) -> RNNTConfig | ConformerConfig:
    """One of :data:`PRESETS` for a vocabulary, with fields changed by keyword."""
    kind, size = _preset(name)
    return kind.preset(size, vocab_size, **changes)


def config_from_dict(values: dict[str, Any]) -> RNNTConfig | ConformerConfig:
    """What :meth:`TransducerConfig.to_dict` of either architecture gave.

    Raises:
        ValueError: on an unknown architecture or fields that it does not have.
    """
    architectures = {kind.architecture: kind for kind in (RNNTConfig, ConformerConfig)}
    found = values.get("architecture")
    if found not in architectures:
        raise ValueError(f"the model's architecture is {found!r}; allowed: {', '.join(architectures)}")
    return architectures[found].from_dict(values)


def architecture_of(name: str) -> str:
    """The architecture of one of :data:`PRESETS`."""
    return _preset(name)[0].architecture


def _preset(name: str) -> tuple[type[RNNTConfig] | type[ConformerConfig], str]:
    """The architecture's class, and which of its own presets it is."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; allowed: {', '.join(PRESETS)}")
    kind, _, size = name.rpartition("-")
    return ConformerConfig if kind else RNNTConfig, size


#: All presets: those with a Conformer are ``conformer-SIZE``.
PRESETS = (*RNNT_PRESETS, *(f"conformer-{size}" for size in CONFORMER_PRESETS))
