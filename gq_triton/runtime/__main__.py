"""``python -m gq_triton.runtime MODEL FILE...``: transcribes WAV files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gq_triton.speech.mel import SAMPLE_RATE

from .audio import read_wav
from .runner import Runner, Stream


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line per file; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        runner = Runner.load(options.model, options.threads)
        stream = runner.stream(options.chunk_ms) if options.stream else None
        for path in options.files:
            text = _play(stream, path) if stream else runner.transcribe(path)
            print(f"{path}: {text}" if len(options.files) > 1 else text, flush=True)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gq_triton.runtime", description="Transcribe speech with a packed model, without torch."
    )
    parser.add_argument("model", metavar="MODEL", help="a packed recognizer, as `gq-triton convert` writes it")
    parser.add_argument("files", metavar="FILE", nargs="+", help="WAV files of 16 kHz")
    parser.add_argument("--stream", action="store_true", help="decode chunk by chunk, and print the text as it grows")
    parser.add_argument("--chunk-ms", type=int, default=240, help="of --stream: milliseconds of a chunk [default: 240]")
    parser.add_argument("--threads", type=int, default=1, help="threads to use at most [default: 1]")
    return parser


def _play(stream: Stream, path: str) -> str:
    """The text of a file, whose beginnings are printed as they are found, each with its time in seconds."""
    stream.reset()
    samples, shown = read_wav(path), ""
    for start in range(0, len(samples), SAMPLE_RATE // 10):
        stop = min(start + SAMPLE_RATE // 10, len(samples))
        if (text := stream.push(samples[start:stop])) != shown:
            shown = text
            print(f"{stop / SAMPLE_RATE:7.2f} s  {text}", flush=True)
    return stream.finish()


if __name__ == "__main__":
    sys.exit(main())
