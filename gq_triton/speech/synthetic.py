"""Synthetic speech: any sentence, and a data set of spoken commands, offline.

Spoken by espeak-ng, which the package espeakng-loader (extra ``quickstart``) brings with its voices. espeak-ng is under
the GNU General Public License, version 3; it runs as a program of its own and gq_triton links to none of it.
"""

import hashlib
import io
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from ..files import write_atomically
from . import espeak
from .audio import resample, to_int16
from .augment import add_noise, random_gain
from .datasets import SAMPLE_RATE, Utterance
from .extras import require

__all__ = ["Request", "command_requests", "speak", "spoken_commands", "spoken_transcripts", "synthesize"]

ACCENTS = (
    "en-us",
    "en-us-nyc",
    "en",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-gb-x-rp",
    "en-029",
)

# espeak-ng's voice variants without whispers, robots, strong echoes, distorted vocal tracts and near copies of one
# another. A variant is the speaker's vocal tract and larynx, so the splits share none; every split hears all accents.
# fmt: off
VARIANTS = {
    "train": (
        "m1", "m2", "m4", "m5", "m7", "Alex", "Andy", "Denis", "Gene", "Jacky", "Lee", "Mario", "Mike", "Reed", "adam",
        "antonio", "boris", "david", "ed", "grandpa", "ian", "iven", "klatt2", "marcelo", "max", "norbert", "paul",
        "pedro", "rob", "sandro", "travis", "f1", "f2", "f4", "Alicia", "Andrea", "anika", "aunty", "belinda",
        "grandma", "steph",
    ),
    "valid": ("m6", "Diogo", "quincy", "f5", "linda"),
    "test": ("m3", "m8", "benjamin", "edward", "john", "robert", "victor", "f3", "Annie"),
}
# fmt: on
COUNTS = {"train": 2000, "valid": 200, "test": 300}

ROOMS = ("kitchen", "bedroom", "office", "garage")
DEVICES = ("light", "fan", "heater", "radio")
OPENINGS = ("window", "door")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMAT = 1


@dataclass(frozen=True)
class Request:
    """One sentence to speak.

    Attributes:
        text: what to say.
        voice: an espeak-ng voice such as "en-us", or with a variant "en-us+f3".
        rate: words a minute, 80..450.
        pitch: 0..99.
    """

    text: str
    voice: str = "en-us"
    rate: int = 175
    pitch: int = 50


def synthesize(text: str, voice: str = "en-us", *, rate: int = 175, pitch: int = 50) -> Tensor:
    """Speak one sentence.

    Args:
        text: what to say.
        voice: an espeak-ng voice such as "en-us", or with a variant "en-us+f3".
        rate: words a minute, 80..450.
        pitch: 0..99.

    Returns:
        float32 (samples,) at 16 kHz; no samples for a text without a word. The same arguments give the same samples.

    Raises:
        ModuleNotFoundError: espeakng-loader is not installed.
        ValueError: an empty text, an unknown voice, or a number out of range.
    """
    return speak([Request(text, voice, rate, pitch)])[0]


def speak(requests: Sequence[Request]) -> list[Tensor]:
    """Speak sentences in order; see :func:`synthesize`.

    espeak-ng carries state from one sentence to the next, so the samples are a function of the whole list.
    """
    loader = require("espeakng_loader", "quickstart")
    for request in requests:
        _check(request, Path(loader.get_data_path()))
    command = [sys.executable, "-I", espeak.__file__, loader.get_library_path(), loader.get_data_path()]
    lines = json.dumps([asdict(request) for request in requests])
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        problem = done.stderr.decode(errors="replace").strip()
        raise ValueError(problem) if done.returncode == 2 else RuntimeError(f"espeak-ng failed: {problem}")
    answer = io.BytesIO(done.stdout)
    (rate,) = struct.unpack("<i", answer.read(4))
    return [resample(_waveform(samples), rate, SAMPLE_RATE) for samples in espeak.read_answer(answer)]


def spoken_commands(
    split: str, count: int | None = None, *, seed: int = 0, cache_dir: str | PathLike[str] | None = None
) -> list[Utterance]:
    """Commands to a house, such as "kitchen light off", "office heater four two" and "call nine one five".

    27 words, thousands of sentences of 1 to 3 seconds, random accents, rates, pitches, levels, pauses and a little
    noise. The splits share no voice variant, and a third of the test's sentences are not in the training set.

    Args:
        split: "train", "valid" or "test".
        count: number of utterances; default 2000, 200 and 300.
        seed: the same seed gives the same samples with the same espeakng-loader and torch.
        cache_dir: where the samples are kept; default ``$XDG_CACHE_HOME/gq_triton`` or ``~/.cache/gq_triton``.

    Raises:
        ModuleNotFoundError: espeakng-loader is not installed.
        ValueError: an unknown split or a count below 1.
    """
    if split not in VARIANTS:
        raise ValueError(f"split must be one of {', '.join(VARIANTS)}, got {split!r}")
    count = COUNTS[split] if count is None else count
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    requests = command_requests(split, count, seed)
    cache = _cache_path(split, requests, seed, Path(cache_dir) if cache_dir else _default_cache())
    recordings = _load(cache)
    if recordings is None:
        recordings = _record(speak(requests), f"{split} {seed}")
        _save(cache, recordings)
    return _utterances(split, requests, [request.text for request in requests], recordings)


def spoken_transcripts(transcripts: Sequence[str], count: int, *, seed: int = 0) -> list[Utterance]:
    """The words of a training set from hundreds of synthetic voices, which a recognizer can learn from first.

    One half are the transcripts themselves, drawn at random; the other half are one to eight words drawn one by one, as
    often as they occur, so that a label model has no sentences to learn by heart.

    Args:
        transcripts: of the training set; not empty.
        count: number of utterances.
        seed: as in :func:`spoken_commands`.

    Raises:
        ModuleNotFoundError: espeakng-loader is not installed.
        ValueError: no word to speak, or a count below 1.
    """
    words = [word for transcript in transcripts for word in transcript.split()]
    if not words or count < 1:
        raise ValueError(f"transcripts have {len(words)} words and count is {count}; at least one of each is needed")
    rng = random.Random(f"transcripts {seed}")
    texts = [_sentence(rng, transcripts, words) for _ in range(count)]
    requests = [
        Request(_pronounced(text), _any_voice(rng), rate=rng.randint(140, 230), pitch=rng.randint(30, 70))
        for text in texts
    ]
    return _utterances("spoken", requests, texts, _record(speak(requests), f"transcripts {seed}"))


def _sentence(rng: random.Random, transcripts: Sequence[str], words: Sequence[str]) -> str:
    return rng.choice(transcripts) if rng.random() < 0.5 else " ".join(rng.choices(words, k=rng.randint(1, 8)))


def _pronounced(text: str) -> str:
    """Letters get a full stop, lest they be taken for words: "a" for the article."""
    return " ".join(f"{word}." if len(word) == 1 else word for word in text.lower().split())


def _any_voice(rng: random.Random) -> str:
    return f"{rng.choice(ACCENTS)}+{rng.choice([variant for split in VARIANTS.values() for variant in split])}"


def _utterances(
    name: str, requests: Sequence[Request], texts: Sequence[str], recordings: Sequence[Tensor]
) -> list[Utterance]:
    return [
        Utterance(f"{name}-{i:05d}", samples.float() / 32768, text, request.voice, len(samples) / SAMPLE_RATE)
        for i, (text, request, samples) in enumerate(zip(texts, requests, recordings, strict=True))
    ]


def command_requests(split: str, count: int, seed: int = 0) -> list[Request]:
    """The sentences, voices, rates and pitches of :func:`spoken_commands`, unspoken."""
    rng = random.Random(f"{split} {seed}")
    return [
        Request(
            text=command(rng),
            voice=f"{rng.choice(ACCENTS)}+{rng.choice(VARIANTS[split])}",
            rate=rng.randint(130, 185),
            pitch=rng.randint(35, 65),
        )
        for _ in range(count)
    ]


def command(rng: random.Random) -> str:
    """One random command."""
    form = rng.choice((_switch, _switch, _dim, _dim, _open, _call, _play))
    return form(rng)


def _switch(rng: random.Random) -> str:
    first = f"{_thing(rng, DEVICES)} {rng.choice(('on', 'off'))}"
    return f"{first} {_thing(rng, DEVICES)} {rng.choice(('on', 'off'))}" if rng.random() < 0.4 else first


def _dim(rng: random.Random) -> str:
    return f"{_thing(rng, DEVICES)} {_number(rng, rng.randint(1, 2))}"


def _open(rng: random.Random) -> str:
    return f"{rng.choice(('open', 'close'))} {_thing(rng, OPENINGS)}"


def _call(rng: random.Random) -> str:
    return f"call {_number(rng, 3)}"


def _play(rng: random.Random) -> str:
    return f"play song {_number(rng, 2)}"


def _thing(rng: random.Random, things: Sequence[str]) -> str:
    return f"{rng.choice(ROOMS)} {rng.choice(things)}"


def _number(rng: random.Random, digits: int) -> str:
    return " ".join(rng.choices(DIGITS, k=digits))


def _check(request: Request, data: Path) -> None:
    if not request.text.strip():
        raise ValueError("text must not be empty")
    if not 80 <= request.rate <= 450:
        raise ValueError(f"rate must lie in 80..450 words a minute, got {request.rate}")
    if not 0 <= request.pitch <= 99:
        raise ValueError(f"pitch must lie in 0..99, got {request.pitch}")
    # The library silently ignores a variant it does not know.
    _, plus, variant = request.voice.partition("+")
    if plus and not (data / "voices" / "!v" / variant).is_file():
        raise ValueError(f"voice: espeak-ng has no variant {variant!r} (in {request.voice!r})")


def _waveform(samples: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(samples, "<i2").astype(np.float32)) / 32768


def _record(waveforms: Sequence[Tensor], seed: str) -> list[Tensor]:
    """Pauses around the speech, a level and a noise floor; int16, as a file would hold them."""
    generator = Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6], "big"))
    return [_record_one(wave, generator) for wave in waveforms]


def _record_one(speech: Tensor, generator: Generator) -> Tensor:
    before, after = torch.randint(800, 3200, (2,), generator=generator).tolist()
    wave = torch.nn.functional.pad(speech, (before, 1600 + after))
    wave = random_gain(wave * (0.5 / speech.abs().amax()), -18.0, 0.0, generator)
    wave = add_noise(wave[None], torch.tensor([len(wave)]), 20.0, 45.0, generator)[0]
    return to_int16(wave)


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gq_triton"


def _cache_path(split: str, requests: Sequence[Request], seed: int, folder: Path) -> Path:
    require("espeakng_loader", "quickstart")
    key = [FORMAT, version("espeakng-loader"), seed, [asdict(request) for request in requests]]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return folder / f"spoken-commands-{split}-{digest[:16]}.safetensors"


def _load(path: Path) -> list[Tensor] | None:
    try:
        stored = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
    return list(stored["samples"].split(stored["lengths"].tolist()))


def _save(path: Path, recordings: Sequence[Tensor]) -> None:
    lengths = torch.tensor([len(samples) for samples in recordings])
    stored = {"samples": torch.cat(list(recordings)), "lengths": lengths}
    write_atomically(path, lambda part: save_file(stored, part))
