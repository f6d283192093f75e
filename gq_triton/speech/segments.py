"""What streaming recognition reports, when a segment of speech ends, and the limits of greedy search. No torch here:
programs that run a packed model without it read this too."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["MAX_SYMBOLS", "WINDOW_FRAMES", "Endpointing", "Result"]

MAX_SYMBOLS = 5  # labels of one encoder frame
WINDOW_FRAMES = 8  # which a joint network evaluates in about the time of one, since it takes reading the same weights


@dataclass(frozen=True)
class Endpointing:
    """When a segment of a stream ends, so that its text is final: the rules of Kaldi's online decoders, of which any
    one suffices. They are looked at after every chunk; what counts is how long ago the last label was emitted.

    Attributes:
        trailing_silence: seconds without a label, after at least one; default 1.2.
        leading_silence: seconds without a label from the segment's start, so that silence does not grow into one long
            segment; default 2.4. The segment's text is empty.
        max_length: seconds that a segment lasts at most, rounded up to a chunk, whatever is spoken; default 20.

    ``math.inf`` switches a rule off.

    Raises:
        ValueError: a number that is not positive.
    """

    trailing_silence: float = 1.2
    leading_silence: float = 2.4
    max_length: float = 20.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{field.name} must be a positive number of seconds, got {value!r}")

    def ends(self, length: float, silence: float, labels: int) -> bool:
        """Whether a segment ends here.

        Args:
            length: of the segment so far, in seconds.
            silence: seconds since its last label, or its start.
            labels: how many it has.
        """
        return length >= self.max_length or silence >= (self.trailing_silence if labels else self.leading_silence)


@dataclass(frozen=True)
class Result:
    """What was heard in a segment of a stream: all of the stream without endpointing.

    Attributes:
        text: so far.
        is_final: the segment is over, and so its text will not change.
        ids: token ids.
        times: of each token the second, counted from the stream's start, at which its encoder frame begins.
        stable: how many tokens, from the first on, will not change: all of them in greedy search, those that all
            hypotheses share in beam search.
        start, end: seconds from the stream's start to the segment's, and to the end of what was decoded.
        ended: segments that ended earlier in the same call, final, the first one first; only with endpointing.
    """

    text: str
    is_final: bool
    ids: tuple[int, ...]
    times: tuple[float, ...]
    stable: int
    start: float
    end: float
    ended: tuple[Result, ...] = ()
