"""Fetching public speech data: resumed, verified, unpacked safely, and in place only when complete."""

import hashlib
import os
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from os import PathLike
from pathlib import Path

from tqdm import tqdm

__all__ = ["LIBRISPEECH", "RECIPES", "DownloadError", "Recipe", "download", "fetch"]

CHUNK = 1 << 20
RETRY_PAUSE = 1.0  # seconds, doubled with every attempt


class DownloadError(RuntimeError):
    """A file could not be fetched, or what came is not what was published."""


@dataclass(frozen=True)
class Recipe:
    """A public archive.

    Attributes:
        urls: places to try, in order.
        sha256: checksum of the archive, hexadecimal.
        folder: what unpacking creates.
        note: size and licence, for people.
    """

    urls: tuple[str, ...]
    sha256: str
    folder: str
    note: str


def _librispeech(split: str, sha256: str, size: str) -> Recipe:
    url = f"https://www.openslr.org/resources/12/{split}.tar.gz"
    return Recipe((url,), sha256, f"LibriSpeech/{split}", f"{size}, CC BY 4.0")


# Checksum and size of each split's archive.
LIBRISPEECH = {
    "dev-clean": ("76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3", "337 MB"),
    "dev-other": ("12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365", "314 MB"),
    "test-clean": ("39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23", "346 MB"),
    "test-other": ("d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29", "328 MB"),
    "train-clean-100": ("d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2", "6.3 GB"),
    "train-clean-360": ("146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf", "23 GB"),
    "train-other-500": ("ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2", "30 GB"),
}

RECIPES = {
    "an4": Recipe(
        (
            "http://www.speech.cs.cmu.edu/databases/an4/an4_sphere.tar.gz",
            "https://dldata-public.s3.us-east-2.amazonaws.com/an4_sphere.tar.gz",
        ),
        "a0525579493735d32b60fb6fa5975dd0eaacde087b0a4eeb7f13b7ef33077b12",
        "an4",
        "64 MB, BSD-like",
    ),
    **{split: _librispeech(split, *facts) for split, facts in LIBRISPEECH.items()},
}


def download(name: str, root: str | PathLike[str], *, progress: bool = True) -> Path:
    """Fetch and unpack a data set; nothing is done where its folder is already there.

    Args:
        name: a key of ``RECIPES``: "an4", or a LibriSpeech split such as "test-clean".
        root: the folder to unpack into, made if need be. The archive is kept there while it is incomplete, so that a
            later call resumes, and removed once unpacked.
        progress: show a progress bar.

    Returns:
        ``root``, as :func:`gq_triton.speech.datasets.librispeech` wants it; AN4 lies in ``root/an4``.

    Raises:
        ValueError: an unknown name.
        DownloadError: no place yields the published archive.
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    recipe, root = RECIPES[name], Path(root)
    if (root / recipe.folder).is_dir():
        return root
    archive = root / Path(recipe.urls[0]).name
    _fetch_any(recipe.urls, archive, recipe.sha256, progress)
    _unpack(archive, root, recipe.folder)
    archive.unlink()
    return root


def fetch(
    url: str,
    path: str | PathLike[str],
    sha256: str,
    *,
    progress: bool = True,
    attempts: int = 5,
    timeout: float = 30.0,
) -> Path:
    """Fetch one file.

    Bytes go to ``path`` + ".part", which an interrupted call leaves behind and a later call continues; ``path`` appears
    only when the checksum is right. A wrong checksum discards everything and starts over.

    Args:
        url: http or https.
        path: where the file shall be; returned at once if it is there with the right checksum.
        sha256: expected checksum, 64 hexadecimal digits.
        progress: show a progress bar.
        attempts: connections to try in all, with growing pauses between them.
        timeout: seconds without a byte before an attempt fails.

    Raises:
        ValueError: attempts below 1 or a malformed checksum.
        DownloadError: all attempts failed.
    """
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    if len(sha256) != 64 or not set(sha256.lower()) <= set("0123456789abcdef"):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")
    path = Path(path)
    if path.is_file() and _sha256(path) == sha256.lower():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(attempts):
        if attempt:
            time.sleep(min(RETRY_PAUSE * 2.0 ** (attempt - 1), 30.0))
        problem = _try_fetch(url, part, sha256.lower(), progress, timeout)
        if problem is None:
            os.replace(part, path)
            return path
    raise DownloadError(f"{url}: {problem} (after {attempts} attempts)")


def _fetch_any(urls: Sequence[str], path: Path, sha256: str, progress: bool) -> None:
    problems = []
    for url in urls:
        try:
            fetch(url, path, sha256, progress=progress)
            return
        except DownloadError as error:
            problems.append(str(error))
    raise DownloadError("; ".join(problems))


def _try_fetch(url: str, part: Path, sha256: str, progress: bool, timeout: float) -> str | None:
    """One connection; None when ``part`` is complete and right, else what went wrong."""
    try:
        complete = _continue(url, part, progress, timeout)
    except urllib.error.HTTPError as error:
        problem = f"HTTP status {error.code} {error.reason}"
        if error.code in (401, 403, 404, 410):
            raise DownloadError(f"{url}: {problem}") from error
        # 416: what we hold is as long as the file, or longer. The checksum decides.
        if error.code != 416:
            return problem
        complete = True
    except (OSError, HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    if not complete:
        return f"the connection closed after {part.stat().st_size} bytes"
    found = _sha256(part)
    if found == sha256:
        return None
    part.unlink()
    return f"wrong checksum: sha256 is {found}, published is {sha256}"


def _continue(url: str, part: Path, progress: bool, timeout: float) -> bool:
    """Append to ``part`` what it lacks; True when the server has sent all it announced."""
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        # A server without ranges answers 200 with the whole file.
        resumed = start > 0 and getattr(response, "status", None) == 206
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with part.open("ab" if resumed else "wb") as file:
            _copy(response, file, start, total, part.stem, progress)
            received = file.tell()
    return total is None or received == total


def _copy(response: HTTPResponse, file, start: int, total: int | None, name: str, progress: bool) -> None:
    with tqdm(total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=not progress) as bar:
        # read1 hands over what has arrived, so that a cut connection loses nothing.
        while chunk := response.read1(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))


def _unpack(archive: Path, root: Path, folder: str) -> None:
    """Unpack aside; ``root / folder``, and the files beside it, appear only when all of it is out."""
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpack-") as scratch:
        try:
            with tarfile.open(archive) as tar:
                # The filter refuses entries that would leave the folder, devices, and links that point outside.
                tar.extractall(scratch, filter="data")
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise DownloadError(f"{archive} cannot be unpacked: {error}") from error
        source, target = Path(scratch) / folder, root / folder
        if not source.is_dir():
            raise DownloadError(f"{archive} holds no folder {folder!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in source.parent.iterdir():
            if file.is_file():
                os.replace(file, target.parent / file.name)
        os.replace(source, target)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
