"""Sizes of the reference recognizers. No torch here: programs that run a packed model without it read this too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

__all__ = ["RNNT_PRESETS", "RNNTConfig"]


@dataclass(frozen=True)
class RNNTConfig:
    """Sizes of an :class:`~gq_triton.models.RNNT`.

    Attributes:
        vocab_size: labels including the blank, which is id 0.
        features: values per input frame.
        stack: input frames joined into one encoder frame; the first time reduction.
        encoder_layers, encoder_hidden: unidirectional LSTM layers and their width.
        encoder_projection: width of each LSTM's output projection, below ``encoder_hidden``; 0 for none.
        reduce_after: layers after which pairs of frames are joined, the second time reduction; 0 for none.
        small_encoder_layers, small_encoder_hidden: those of a second, small encoder for the wake word, which makes it a
            Bifocal RNN-T (see :class:`~gq_triton.models.rnnt.BifocalEncoder`); 0 and 0 for none.
        predictor_embedding, predictor_hidden, predictor_layers: the label LSTM.
        joint: width of the joint network.
        dropout: probability, after the encoder's layers and the predictor's.
    """

    vocab_size: int
    features: int = 80
    stack: int = 4
    encoder_layers: int = 3
    encoder_hidden: int = 320
    encoder_projection: int = 0
    reduce_after: int = 1
    small_encoder_layers: int = 0
    small_encoder_hidden: int = 0
    predictor_embedding: int = 64
    predictor_hidden: int = 128
    predictor_layers: int = 1
    joint: int = 256
    dropout: float = 0.2

    def __post_init__(self) -> None:
        may_be_zero = {"encoder_projection", "reduce_after", "small_encoder_layers", "small_encoder_hidden", "dropout"}
        for field in fields(self):
            value, kind = getattr(self, field.name), (int, float) if field.name == "dropout" else int
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{field.name} is {value!r}; a number is needed, whole but for dropout")
            if not value >= 0 or (value == 0 and field.name not in may_be_zero):
                raise ValueError(f"{field.name} is {value}; a positive number is needed")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; the blank and at least one label are needed")
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
        if self.dropout >= 1:
            raise ValueError(f"dropout is {self.dropout}; allowed: 0 <= dropout < 1")

    @classmethod
    def preset(cls, name: str, vocab_size: int, **changes) -> RNNTConfig:
        """One of :data:`RNNT_PRESETS` for a vocabulary, with fields changed by keyword."""
        if name not in RNNT_PRESETS:
            raise ValueError(f"preset is {name!r}; allowed: {', '.join(RNNT_PRESETS)}")
        return replace(cls(vocab_size=vocab_size, **RNNT_PRESETS[name]), **changes)

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

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> RNNTConfig:
        """The inverse of :meth:`to_dict`; raises ValueError on unknown fields."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"RNNTConfig has no field {', '.join(sorted(unknown))}")
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
