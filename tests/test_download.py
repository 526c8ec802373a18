"""runs/download.py and slam/download.py against a server that breaks off, stalls, lies, refuses, changes its mind."""
import contextlib
import hashlib
import http.server
import io
import json
import re
import resource
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from conftest import run, start

from runs.download import extract, fetch, fetch_tar_piece
from slam.download import from_hub, published

CONTENT = bytes(range(256)) * 1200  # 300 KB
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
PATIENCE = {"tries": 3, "pause": 0.0, "timeout": 0.5}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}; each request takes a trick from `tricks`, or none if they are used up."""

    def __init__(self):
        self.files, self.tricks, self.asked, self.sent = {"/thing.bin": CONTENT}, [], [], 0
        self.tag, self.free = '"1"', threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str = "/thing.bin") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, *args) -> None:  # a client that hangs up is no news here
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        server, trick = self.server, self.server.tricks.pop(0) if self.server.tricks else ""
        server.asked.append((self.headers.get("Range"), self.headers.get("If-Range")))
        self.close_connection = True
        whole = server.files.get(self.path, b"")
        if trick in (401, 403, 404, 416, 503):
            return self.send_error(trick)
        span = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(span[1]), int(span[2]) + 1 if span[2] else len(whole)) if span else (0, len(whole))
        if trick == "no ranges" or span and self.headers.get("If-Range", server.tag) != server.tag:
            span, first, last = None, 0, len(whole)
        elif span and first >= len(whole):
            return self.send_error(416)
        body, length = whole[first:last], min(last, len(whole)) - first
        if trick == "a web page":
            body = b"<!DOCTYPE html><title>Sign in</title>"
            length = len(body)
        self.send_response(206 if span else 200)
        if span and trick != "no span":
            self.send_header("Content-Range", f"bytes {first}-{first + length - 1}/{len(whole)}")
        if trick == "says more":
            length += 1000
        elif trick == "says less":
            length -= 1000
        if trick != "no length":
            self.send_header("Content-Length", str(length))
        if server.tag and trick != "no tag":
            self.send_header("ETag", server.tag)
        self.send_header("Content-Type", "text/html" if trick == "a web page" else "application/octet-stream")
        self.end_headers()
        if trick == "wrong bytes":
            body = bytes(len(body))
        elif trick in ("breaks off", "stalls"):
            body = body[:len(body) // 3]
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            server.sent += len(body)
            self.wfile.flush()
        if trick == "stalls":
            server.free.wait(20)


@pytest.fixture
def server():
    with Server() as server:
        yield server
        server.free.set()
        server.shutdown()


@pytest.mark.parametrize("tricks", [
    [], ["breaks off"], ["stalls"], ["breaks off", "stalls", "breaks off"], [503], ["says more"],
    ["breaks off", "no ranges"], ["breaks off", "no tag"], ["breaks off", "no span"], ["breaks off", 416]])
def test_what_trying_again_mends(tmp_path, server, tricks):
    server.tricks = list(tricks)
    size = 0 if tricks == ["says more"] else len(CONTENT)
    path = fetch(server.url(), tmp_path / "new" / "thing.bin", DIGEST, size, **PATIENCE)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["thing.bin"]
    asked = len(server.asked)
    assert fetch(server.url(), path) == path and len(server.asked) == asked  # not fetched again
    if tricks in (["breaks off"], ["stalls"]):
        assert server.sent == len(CONTENT)  # nothing came twice
        assert server.asked[1] == (f"bytes={len(CONTENT) // 3}-", '"1"')


def test_a_record_that_a_kill_cut_short(tmp_path, server):
    """Of such a part nothing is known, so it is fetched anew."""
    (tmp_path / "thing.bin.part").write_bytes(b"something else")
    (tmp_path / "thing.bin.part.json").write_text('{"url": "')
    assert fetch(server.url(), tmp_path / "thing.bin", **PATIENCE).read_bytes() == CONTENT


def test_a_file_that_changes_between_two_tries_is_fetched_anew(tmp_path, server):
    server.tricks = ["breaks off", 503, 503, 503]
    with pytest.raises(SystemExit, match="3 tries in a row failed.*100?,?.* bytes are kept in .*thing.bin.part"):
        fetch(server.url(), tmp_path / "thing.bin", **PATIENCE)
    assert (tmp_path / "thing.bin.part").read_bytes() == CONTENT[:len(CONTENT) // 3]
    server.files["/thing.bin"], server.tag = CONTENT[::-1] + b"more", '"2"'
    assert fetch(server.url(), tmp_path / "thing.bin", **PATIENCE).read_bytes() == CONTENT[::-1] + b"more"


def test_a_change_that_the_server_hides_is_noticed_by_the_size(tmp_path, server):
    """Without a version to ask for, the rest of another file comes; its whole size tells."""
    server.tag = ""
    server.tricks = ["breaks off", 503, 503, 503]
    with pytest.raises(SystemExit):
        fetch(server.url(), tmp_path / "thing.bin", **PATIENCE)
    server.files["/thing.bin"] = b"x" * (len(CONTENT) + 5)
    assert set(fetch(server.url(), tmp_path / "thing.bin", **PATIENCE).read_bytes()) == {ord("x")}


@pytest.mark.parametrize("tricks, words, kept", [
    ([401], "401 Unauthorized.*account or a licence", False), ([403], "403 Forbidden.*account or a licence", False),
    ([404], "it is not there", False), (["a web page"], "web page came instead", False),
    (["wrong bytes"], "not the published file: sha256:.* instead of sha256:", False),
    (["says less"], "the published one has 307,200", False),
    (["says more"], "the server has a file of 308,200", False), ([503] * 3, "3 tries in a row failed", False),
    (["breaks off"] + [503] * 3, "102,400 bytes are kept in", True),
    (["breaks off", 403], "account or a licence", True)])
def test_what_trying_again_does_not_mend(tmp_path, server, tricks, words, kept):
    server.tricks = list(tricks)
    path = tmp_path / "thing.bin"
    with pytest.raises(SystemExit, match=words):
        fetch(server.url(), path, DIGEST, len(CONTENT), **PATIENCE)
    assert not path.exists() and (tmp_path / "thing.bin.part").exists() == kept
    assert fetch(server.url(), path, DIGEST, len(CONTENT), **PATIENCE).read_bytes() == CONTENT  # the next day


@pytest.mark.parametrize("trick", ["says less", "no length", "a web page"])
def test_a_lie_with_nothing_published_to_compare_with(tmp_path, server, trick):
    server.tricks = [trick]
    if trick == "says less":  # a whole file, as far as anyone can tell; only a published sum or size knows better
        assert fetch(server.url(), tmp_path / "x", **PATIENCE).read_bytes() == CONTENT[:-1000]
        return
    with pytest.raises(SystemExit, match="how long the file is|web page"):
        fetch(server.url(), tmp_path / "x", **PATIENCE)
    assert not (tmp_path / "x").exists()


def test_a_web_page_in_disguise(tmp_path, server):
    server.files["/x.zip"] = b"\n<html><title>Quota exceeded</title>" * 9
    with pytest.raises(SystemExit, match="web page came instead"):
        fetch(server.url("/x.zip"), tmp_path / "x.zip", **PATIENCE)
    assert not [*tmp_path.iterdir()][1:]


def test_the_same_url_gives_the_same_again(tmp_path, server):
    """Where no sum is published, the first download's is what there is to trust."""
    sums = tmp_path / "fetched.jsonl"
    fetch(server.url(), tmp_path / "thing.bin", sums=sums, **PATIENCE).unlink()
    assert json.loads(sums.read_text())["digest"] == DIGEST
    fetch(server.url(), tmp_path / "thing.bin", sums=sums, **PATIENCE).unlink()
    server.files["/thing.bin"] = bytes(len(CONTENT))
    with pytest.raises(SystemExit, match=r"not the file that was fetched on 20.* remove that line of .*fetched.jsonl"):
        fetch(server.url(), tmp_path / "thing.bin", sums=sums, **PATIENCE)
    assert not (tmp_path / "thing.bin").exists()


FETCH = "import sys; from runs.download import fetch; fetch(*sys.argv[1:3], timeout=30.0, pause=0.0)"


def test_a_full_disk_is_said_and_the_part_is_kept(tmp_path, server):
    """A limit on the size of files fails like a full disk, in the middle of a write."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = run("-c", FETCH, server.url(), tmp_path / "thing.bin", check=False, preexec_fn=limit)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "File too large. The 100,000 bytes that it holds are kept; make room" in result.stderr
    server.sent = 0
    assert fetch(server.url(), tmp_path / "thing.bin", DIGEST, **PATIENCE).read_bytes() == CONTENT
    assert server.sent == len(CONTENT) - 100_000

    (tmp_path / "full.bin.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="full.bin.part: No space left on device"):
        fetch(server.url(), tmp_path / "full.bin", **PATIENCE)


def test_a_killed_download_goes_on(tmp_path, server):
    server.tricks = ["stalls"]
    part = tmp_path / "thing.bin.part"
    process = start("-c", FETCH, server.url(), tmp_path / "thing.bin")
    process.until(lambda: part.exists() and part.stat().st_size == len(CONTENT) // 3)
    process.kill()
    process.end()
    assert not (tmp_path / "thing.bin").exists()
    run("-c", FETCH, server.url(), tmp_path / "thing.bin")
    assert (tmp_path / "thing.bin").read_bytes() == CONTENT and server.sent == len(CONTENT)


# ---------------------------------------------------------------- published files, pieces, archives, the hub

def test_a_published_file_is_checked_on_every_use(tmp_path, server, monkeypatch):
    monkeypatch.setenv("SLAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("slam.download.TWIST_URL", server.url("/"))
    sha256 = DIGEST.removeprefix("sha256:")
    for trick, words in (("breaks off", "can't be fetched.*IncompleteRead"), (503, "can't be fetched.*503")):
        server.tricks = [trick]
        with pytest.raises(SystemExit, match=words):
            published("thing.bin", sha256)
    with pytest.raises(SystemExit, match="can't be fetched .what came is not the published file"):
        published("page.html", sha256)
    assert not (tmp_path / "cache" / "published").exists()  # nothing has the name of a whole file
    path = published("thing.bin", sha256)
    assert path.read_bytes() == CONTENT and tmp_path / "cache" in path.parents
    asked = len(server.asked)
    assert published("thing.bin", sha256) == path and len(server.asked) == asked  # not fetched again
    path.write_bytes(b"altered")
    with pytest.raises(SystemExit, match=f"instead of {sha256}; remove it, and fetch it again"):
        published("thing.bin", sha256)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}


@pytest.mark.parametrize("n, format", [(3, tarfile.GNU_FORMAT), (20, tarfile.GNU_FORMAT), (16, tarfile.PAX_FORMAT)])
def test_the_pieces_of_a_tar_are_the_whole(tmp_path, server, n, format, monkeypatch):
    """Every member is in exactly one piece, whole, wherever the borders fall; some pieces may be empty.

    Names are long and times are fractions, so that other headers precede the members' own.
    """
    monkeypatch.setattr("runs.download.WINDOW", 2048)
    with tarfile.open(tmp_path / "whole.tar", "w", format=format) as tar:
        for i in range(12):
            info = tarfile.TarInfo(f"large/{i}/{'book' * (i % 3 * 20)}/{i}.flac")
            info.mtime = i + 0.5
            content = hashlib.sha256(bytes([i])).digest() * (i * 37 % 200)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    server.files["/whole.tar"] = (tmp_path / "whole.tar").read_bytes()
    found, sizes = {}, []
    for i in range(n):
        server.tricks = ["breaks off"] * (i % 2)
        piece = fetch_tar_piece(server.url("/whole.tar"), tmp_path / f"{i}.tar", i, n, **PATIENCE)
        new = members(piece)
        assert not found.keys() & new.keys()
        found |= new
        sizes.append(piece.stat().st_size)
    assert found == members(tmp_path / "whole.tar")
    assert sum(sizes) - 1024 * n == len(server.files["/whole.tar"])  # which is read only once, but for the borders
    server.tricks = ["no ranges"] * 9
    with pytest.raises(SystemExit, match="can't give a part of the file"):
        fetch_tar_piece(server.url("/whole.tar"), tmp_path / "again.tar", 1, n, **PATIENCE)


def test_archives_are_unpacked_flat_and_whole(tmp_path):
    names = ["top/syntactic/dev/a.wav", "top/syntactic/dev/gold.csv", "top/lexical/dev/b.wav",
             "__MACOSX/syntactic/dev/c", "top/syntactic/dev/._a.wav"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z, tarfile.open(tmp_path / "x.tgz", "w:gz") as t:
        for name in names:
            z.writestr(name, name)
            info = tarfile.TarInfo(name)
            info.size = len(name)
            t.addfile(info, io.BytesIO(name.encode()))
    for archive in ("x.zip", "x.tgz"):
        folder = tmp_path / archive.replace(".", "_")
        extract(tmp_path / archive, folder, "syntactic/dev/")
        assert sorted(p.name for p in folder.iterdir()) == ["a.wav", "gold.csv"]
        assert (folder / "a.wav").read_text() == names[0]
        with pytest.raises(SystemExit, match="can't be unpacked.*no files 'nothing'"):
            extract(tmp_path / archive, tmp_path / "none", "nothing")
    for archive in ("x.zip", "x.tgz"):
        data = (tmp_path / archive).read_bytes()
        (tmp_path / "cut").write_bytes(data[:len(data) // 2])
        with pytest.raises(SystemExit, match="can't be unpacked"):
            extract(tmp_path / "cut", tmp_path / "none")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as z:
        z.writestr("a/x.wav", "1")
        z.writestr("../../b/x.wav", "2")
    with pytest.raises(SystemExit, match="File exists"):
        extract(tmp_path / "twice.zip", tmp_path / "none")
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.new").exists()


@pytest.mark.parametrize("code, header, words", [
    (403, "GatedRepo", "Cannot access gated repo.*If https://huggingface.co/some/model asks for an account.*HF_TOKEN"),
    (401, "RepoNotFound", "Repository Not Found.*Check the name"), (500, "", "Check the name, the network"),
    (None, "", "Check the name, the network")])
def test_the_hub_refuses(tmp_path, monkeypatch, code, header, words):
    """huggingface_hub itself, against a server that answers as the hub does."""
    class Hub(Handler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", header)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        port = hub.server_port if code else 9  # nobody listens at 9
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        with pytest.raises(SystemExit, match=words):
            from_hub("some/model", ["*.json"], "model", tmp_path)
        hub.shutdown()
