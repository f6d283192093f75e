import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gq_triton.speech import download as module
from gq_triton.speech.download import RECIPES, DownloadError, Recipe, download, fetch

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site:
    """A local HTTP server whose next answers are scripted; afterwards it behaves.

    An action is a function of (handler, content from the requested place on); it returns the bytes to send.
    """

    def __init__(self):
        site = self
        self.content, self.actions, self.ranges, self.resumable = CONTENT, [], [], True

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.answer(self)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/data.bin"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler):
        asked = handler.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked[len("bytes=") : -1]) if asked and self.resumable else 0
        action = self.actions.pop(0) if self.actions else None
        if isinstance(action, int):
            handler.send_error(action)
            return
        if start >= len(self.content):
            handler.send_error(416)
            return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(action(body) if action else body)


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(module, "RETRY_PAUSE", 0.0)


def cut(bytes_sent):
    return lambda body: body[:bytes_sent]


def corrupt(body):
    return b"\xff" + body[1:]


def get(site, path, **arguments):
    return fetch(site.url, path, SHA256, progress=False, timeout=5, **arguments)


def test_a_whole_file(site, tmp_path):
    path = get(site, tmp_path / "new" / "data.bin")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["data.bin"]
    assert site.ranges == [None]


def test_a_file_already_there_is_not_fetched(site, tmp_path):
    (tmp_path / "data.bin").write_bytes(CONTENT)
    get(site, tmp_path / "data.bin")
    assert site.ranges == []


def test_a_wrong_file_already_there_is_replaced(site, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"old")
    assert get(site, tmp_path / "data.bin").read_bytes() == CONTENT


def test_interruptions_are_resumed_where_they_broke_off(site, tmp_path):
    site.actions = [cut(200_000), cut(100_000)]
    assert get(site, tmp_path / "data.bin").read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=200000-", "bytes=300000-"]


def test_a_later_call_resumes(site, tmp_path):
    site.actions = [cut(200_000)]
    with pytest.raises(DownloadError, match="1 attempts"):
        get(site, tmp_path / "data.bin", attempts=1)
    assert not (tmp_path / "data.bin").exists()
    assert (tmp_path / "data.bin.part").stat().st_size == 200_000
    assert get(site, tmp_path / "data.bin").read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=200000-"]


def test_a_server_without_ranges_starts_over(site, tmp_path):
    site.resumable, site.actions = False, [cut(200_000)]
    assert get(site, tmp_path / "data.bin").read_bytes() == CONTENT


def test_corruption_is_discarded_and_fetched_anew(site, tmp_path):
    site.actions = [corrupt]
    assert get(site, tmp_path / "data.bin").read_bytes() == CONTENT
    assert site.ranges == [None, None]


@pytest.mark.parametrize("length", [len(CONTENT), len(CONTENT) + 5])
def test_a_corrupt_part_as_long_as_the_file_recovers(site, tmp_path, length):
    (tmp_path / "data.bin.part").write_bytes(b"x" * length)
    assert get(site, tmp_path / "data.bin").read_bytes() == CONTENT
    assert site.ranges == [f"bytes={length}-", None]


def test_a_complete_part_is_taken(site, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert get(site, tmp_path / "data.bin").read_bytes() == CONTENT
    assert site.ranges == [f"bytes={len(CONTENT)}-"]


def test_lasting_corruption_is_an_error_and_leaves_nothing(site, tmp_path):
    site.actions = [corrupt] * 3
    with pytest.raises(DownloadError, match=r"wrong checksum.*3 attempts"):
        get(site, tmp_path / "data.bin", attempts=3)
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again(site, tmp_path):
    site.actions = [503, 500]
    assert get(site, tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_missing_page_is_not(site, tmp_path):
    site.actions = [404] * 5
    with pytest.raises(DownloadError, match="404"):
        get(site, tmp_path / "data.bin")
    assert len(site.ranges) == 1


def test_no_server(tmp_path):
    with pytest.raises(DownloadError, match="refused"):
        fetch("http://127.0.0.1:9/data.bin", tmp_path / "data.bin", SHA256, progress=False, attempts=2)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="attempts"):
        fetch("http://x", tmp_path / "a", SHA256, attempts=0)
    with pytest.raises(ValueError, match="sha256"):
        fetch("http://x", tmp_path / "a", "abc")
    with pytest.raises(ValueError, match="name must be one of an4"):
        download("timit", tmp_path)


def archive(entries):
    """A .tar.gz of {name: content}; an entry may also be a TarInfo."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in entries.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if info is content else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def offer(site, monkeypatch, content, folder="corpus/dev"):
    site.content = content
    recipe = Recipe((site.url,), hashlib.sha256(content).hexdigest(), folder, "")
    monkeypatch.setitem(RECIPES, "small", recipe)


def test_a_data_set_is_unpacked_once(site, tmp_path, monkeypatch):
    offer(site, monkeypatch, archive({"corpus/LICENSE": b"free", "corpus/dev/a/b.txt": b"hello"}))
    assert download("small", tmp_path / "root", progress=False) == tmp_path / "root"
    found = {str(p.relative_to(tmp_path / "root")): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"corpus/LICENSE": b"free", "corpus/dev/a/b.txt": b"hello"}
    download("small", tmp_path / "root", progress=False)
    assert len(site.ranges) == 1


def test_a_second_place_is_tried(site, tmp_path, monkeypatch):
    offer(site, monkeypatch, archive({"corpus/dev/a": b"x"}))
    urls = ("http://127.0.0.1:9/data.bin", site.url)
    monkeypatch.setitem(RECIPES, "small", Recipe(urls, RECIPES["small"].sha256, "corpus/dev", ""))
    download("small", tmp_path, progress=False)
    assert (tmp_path / "corpus/dev/a").read_bytes() == b"x"


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "entries",
    [
        {"corpus/dev/a": b"x", "../evil": b"x"},
        {"corpus/dev/a": b"x", "corpus/../../evil": b"x"},
        {"corpus/dev/a": b"x", "corpus/out": link("corpus/out", "../../..")},
        {"corpus/dev/a": b"x", "corpus/root": link("corpus/root", "/etc")},
        {"other/a": b"x"},
    ],
)
def test_hostile_and_wrong_archives_change_nothing(site, tmp_path, monkeypatch, entries):
    offer(site, monkeypatch, archive(entries))
    with pytest.raises(DownloadError):
        download("small", tmp_path / "root", progress=False)
    assert [p.name for p in tmp_path.rglob("*")] == ["root", "data.bin"]


@pytest.mark.parametrize("content", [b"no archive", archive({"corpus/dev/a": bytes(range(256)) * 50})[:150]])
def test_what_is_no_archive_is_an_error(site, tmp_path, monkeypatch, content):
    offer(site, monkeypatch, content)
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        download("small", tmp_path, progress=False)
    assert not (tmp_path / "corpus").exists()


def test_recipes_are_well_formed():
    assert len(RECIPES) == 8
    for recipe in RECIPES.values():
        assert len(bytes.fromhex(recipe.sha256)) == 32
        assert all(url.endswith(".tar.gz") for url in recipe.urls)
