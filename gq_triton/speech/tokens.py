"""Tokenizers: text to token ids and back.

Every tokenizer keeps id 0 for the transducer's blank, which no text encodes to, and id 1 for ``<unk>``, which stands
for whatever was not in the training texts. Runs of white space in a text count as one space.
"""

import base64
import binascii
import io
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from .extras import require

__all__ = ["CharTokenizer", "SubwordTokenizer", "Tokenizer", "WordTokenizer", "tokenizer_from_dict", "train_tokenizer"]

BLANK = 0
UNKNOWN = 1
UNKNOWN_TEXT = "<unk>"


class Tokenizer:
    """What all tokenizers offer; built by :func:`train_tokenizer` or :func:`tokenizer_from_dict`."""

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Number of ids, blank and unknown included."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, each in 1..vocab_size - 1."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; blanks are skipped.

        Raises:
            ValueError: an id outside 0..vocab_size - 1.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description for :func:`tokenizer_from_dict`."""
        raise NotImplementedError

    def _check_ids(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}, got {token}")


class _SymbolTokenizer(Tokenizer):
    """One token per symbol of a fixed list: id 2 + its place."""

    separator: ClassVar[str]

    def __init__(self, symbols: list[str]) -> None:
        if not isinstance(symbols, list) or not symbols or not all(isinstance(symbol, str) for symbol in symbols):
            raise ValueError(f"symbols must be a non-empty list of strings, got {symbols!r}")
        if len(set(symbols)) != len(symbols):
            raise ValueError("symbols must be distinct")
        self.symbols = symbols
        self._ids = {symbol: place + 2 for place, symbol in enumerate(self.symbols)}
        self._texts = ["", UNKNOWN_TEXT, *self.symbols]

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(symbol, UNKNOWN) for symbol in self._split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        self._check_ids(ids)
        joined = self.separator.join(self._texts[token] for token in ids if token != BLANK)
        return " ".join(joined.split())

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "symbols": self.symbols}

    @classmethod
    def train(cls, texts: Iterable[str]) -> "_SymbolTokenizer":
        """The tokenizer of every symbol in the texts, in sorted order."""
        return cls(sorted({symbol for text in texts for symbol in cls._split(text)}))

    @classmethod
    def _split(cls, text: str) -> list[str]:
        raise NotImplementedError


class WordTokenizer(_SymbolTokenizer):
    """One token per word.

    Args:
        symbols: list of the words, distinct; word i has id i + 2.
    """

    kind = "word"
    separator = " "

    @classmethod
    def _split(cls, text: str) -> list[str]:
        return text.split()


class CharTokenizer(_SymbolTokenizer):
    """One token per character, the space among them.

    Args:
        symbols: list of the characters, distinct; character i has id i + 2.
    """

    kind = "char"
    separator = ""

    @classmethod
    def _split(cls, text: str) -> list[str]:
        return list(" ".join(text.split()))


class SubwordTokenizer(Tokenizer):
    """Unigram subwords by sentencepiece (Kudo 2018, arXiv 1804.10959).

    Args:
        model: a serialised sentencepiece model whose id 0 is the blank and 1 the unknown piece.

    Raises:
        ValueError: the bytes are not such a model.
    """

    kind = "subword"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = require("sentencepiece").SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"model is not a sentencepiece model ({error})") from error
        if self._processor.pad_id() != BLANK or self._processor.unk_id() != UNKNOWN:
            raise ValueError("model must keep id 0 for the blank (its padding piece) and id 1 for the unknown piece")

    @property
    def vocab_size(self) -> int:
        return self._processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(" ".join(text.split()))

    def decode(self, ids: Sequence[int]) -> str:
        self._check_ids(ids)
        pieces = [self._processor.IdToPiece(token) for token in ids if token != BLANK]
        return " ".join("".join(pieces).replace("\u2581", " ").split())

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": base64.b64encode(self._model).decode("ascii")}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "SubwordTokenizer":
        """Train on texts. ``vocab_size`` is an upper limit: few texts yield fewer pieces."""
        model = io.BytesIO()
        require("sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=(" ".join(text.split()) for text in texts),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="unigram",
            character_coverage=1.0,
            normalization_rule_name="identity",
            pad_id=BLANK,
            pad_piece="<blank>",
            unk_id=UNKNOWN,
            unk_piece=UNKNOWN_TEXT,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue())


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 256) -> Tokenizer:
    """Build a tokenizer from transcripts.

    Args:
        kind: "word", "char" or "subword".
        texts: the training transcripts.
        vocab_size: for "subword" only, the most ids wanted, blank and unknown included; at least the number of
            distinct characters + 3.

    Raises:
        ValueError: an unknown kind, texts without a word, or a vocab_size too small for the texts' characters.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("texts must hold at least one word")
    if kind == "word":
        return WordTokenizer.train(texts)
    if kind == "char":
        return CharTokenizer.train(texts)
    if kind == "subword":
        _check_vocab_size(vocab_size, texts)
        return SubwordTokenizer.train(texts, vocab_size)
    raise ValueError(f"kind must be 'word', 'char' or 'subword', got {kind!r}")


def tokenizer_from_dict(description: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from ``to_dict()``.

    Raises:
        ValueError: the description is not one that ``to_dict`` writes.
    """
    kind = description.get("kind")
    if kind == "subword":
        return SubwordTokenizer(_decode_base64(description.get("model")))
    for cls in (WordTokenizer, CharTokenizer):
        if kind == cls.kind:
            return cls(description.get("symbols", []))
    raise ValueError(f"description's kind must be 'word', 'char' or 'subword', got {kind!r}")


def _decode_base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error) as error:
        raise ValueError("description's model must be a base64 string") from error


def _check_vocab_size(vocab_size: int, texts: Sequence[str]) -> None:
    # Blank, unknown, sentencepiece's mark of a word's start, and every character.
    characters = {character for text in texts for character in text if not character.isspace()}
    if vocab_size < len(characters) + 3:
        raise ValueError(f"vocab_size must be at least {len(characters) + 3} for these texts, got {vocab_size}")
