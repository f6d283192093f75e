"""Speak sentences with the espeak-ng library, as a program of its own.

espeak-ng keeps state from one utterance to the next: the same request differs in its samples when others came
before it. So requests are spoken by a fresh process, in order, and the answer depends on the list of requests alone.
The program needs only the standard library; it never imports gq_triton.

Arguments: the library's path, its data's path. Standard input: a JSON list of {"text", "voice", "rate", "pitch"}.
Standard output: the sample rate, then per request the number of samples and the samples; little-endian int32 and int16.
Exit status: 2 for a request that cannot be spoken, with the reason on standard error.
"""

import ctypes
import json
import struct
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

# From espeak-ng's speak_lib.h.
OUTPUT_SYNCHRONOUS = 2
DONT_EXIT = 0x8000
POSITION_CHARACTER = 1
CHARS_UTF8 = 1
RATE, PITCH = 1, 3

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The library, opened. ``speak`` gives 16-bit samples at ``sample_rate`` Hz."""

    def __init__(self, library: str, data: str) -> None:
        self._library = ctypes.CDLL(library)
        self.sample_rate = self._library.espeak_Initialize(OUTPUT_SYNCHRONOUS, 0, data.encode(), DONT_EXIT)
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with the data in {data}")
        self._pieces: list[bytes] = []
        # The library keeps a bare pointer to the callback, so it must live as long as the library does.
        self._callback = CALLBACK(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> bytes:
        """Samples of a text.

        Args:
            text: what to say.
            voice: an espeak-ng voice such as "en-us", with a variant "en-us+f3" if wanted.
            rate: words a minute.
            pitch: 0..99.

        Raises:
            ValueError: no such voice.
            RuntimeError: the library reports a failure.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self._library.espeak_SetParameter(RATE, rate, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        # The breath of some voices is drawn from a generator that the library seeds with the time of day.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._pieces.clear()
        encoded = text.encode() + b"\0"
        size = ctypes.c_size_t(len(encoded))
        status = self._library.espeak_Synth(encoded, size, 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None)
        if status != 0:
            raise RuntimeError(f"espeak-ng failed with status {status} on {text!r}")
        self._library.espeak_Synchronize()
        return b"".join(self._pieces)

    def _collect(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0


def read_answer(answer: BinaryIO) -> Iterator[bytes]:
    """The samples of each request in the program's output, after its sample rate was read."""
    while header := answer.read(4):
        yield answer.read(2 * struct.unpack("<i", header)[0])


def main() -> None:
    """Answer the requests on standard input."""
    espeak = Espeak(*sys.argv[1:])
    sys.stdout.buffer.write(struct.pack("<i", espeak.sample_rate))
    for request in json.load(sys.stdin):
        try:
            samples = espeak.speak(**request)
        except ValueError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        sys.stdout.buffer.write(struct.pack("<i", len(samples) // 2) + samples)


if __name__ == "__main__":
    main()
