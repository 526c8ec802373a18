"""Fetch a large file for runs/corpora.py: it is resumed, checked, and has its name only when it is whole.

    fetch("https://www.openslr.org/resources/12/dev-clean.tar.gz", "data/dev-clean.tar.gz", "sha256:76f8…")
    fetch_tar_piece("https://dl.fbaipublicfiles.com/librilight/data/large.tar", "large-017.tar", 17, 102)

What has come of a file is in NAME.part; the same call goes on with it, if the file is still the same by its size and
ETag. What can't be mended by trying again ends with a SystemExit that says what happened, what is kept and what to do.
"""
import contextlib
import errno
import http.client
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from slam.embedded import file_digest

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}  # errors of a disk
WINDOW = 16 << 20  # bytes that are searched at a time for the header of a tar's member


# ---------------------------------------------------------------- a file
def connect(url: str, first: int, last: int | None, version: str, timeout: float):
    """Ask for bytes first:last. (stream, first byte that it gives, size of the whole file or None, version).

    version: a strong ETag or a date; the server is asked for the rest of that version only, else for the whole file.
    """
    if url.startswith("file:"):
        stream = open(url2pathname(urlsplit(url).path), "rb")
        stream.seek(first)
        status = os.fstat(stream.fileno())
        return stream, first, status.st_size, str(status.st_mtime_ns)
    headers = {"User-Agent": "slam", "Accept-Encoding": "identity"}
    if first or last:
        headers["Range"] = f"bytes={first}-{last - 1 if last else ''}"
        headers |= {"If-Range": version} if version else {}
    answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    tag = answer.headers.get("ETag") or ""
    version = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified") or ""
    length = answer.headers.get("Content-Length")
    start, whole = 0, int(length) if length else None
    if answer.status == 206:
        span = re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if not span:
            raise ConnectionError("a part came, and the server does not say which")
        start, whole = int(span[1]), int(span[2])
    if "text/html" in answer.headers.get("Content-Type", ""):
        raise SystemExit(f"{url}: a web page came instead of the file: the site asks for an account, a licence or "
                         f"patience (a quota). Open it in a browser, and see what it wants")
    return answer, start, whole, version


def transfer(url: str, part: Path, first: int, last: int | None, size: int, timeout: float) -> None:
    """Append to `part` what it lacks of bytes first:last. OSError or HTTPException if that breaks off.

    SystemExit if the server has another file, or can't give a range, or the disk is full.
    """
    from tqdm import tqdm
    record = part.with_name(part.name + ".json")
    known = {}
    with contextlib.suppress(OSError, ValueError):  # not there, or cut short by a kill
        known = json.loads(record.read_text())
    have = size_of(part) if (known.get("url"), known.get("first")) == (url, first) else 0
    if have and have == (last or known["size"] or -1) - first:
        return
    stream, start, whole, version = connect(url, first + have, last, known.get("version", ""), timeout)
    with stream:
        if size and whole and whole != size:
            raise SystemExit(f"{url}: the server has a file of {whole:,} bytes; the published one has {size:,}. It may "
                             f"be another version; look at the site")
        if not (whole or size or getattr(stream, "chunked", False)):
            raise SystemExit(f"{url}: the server does not say how long the file is, so none can tell when it is whole")
        if have and (known["size"], known["version"]) != (whole, version):
            print(f"{url}: the file has changed since a part of it was fetched; fetching it anew", file=sys.stderr)
            have = 0
            if start:
                part.unlink()
                raise ConnectionError("another file")
        if start not in (0, first + have) or start == 0 and first:
            raise SystemExit(f"{url}: the server can't give a part of the file, which is needed here")
        record.write_text(json.dumps({"url": url, "first": first, "size": whole, "version": version}))
        want, at = (last or whole or 0) - first, start - first  # bytes of the whole part, and before the next
        with (open(part, "ab", buffering=0) as f,
              tqdm(total=want or None, initial=have, unit="B", unit_scale=True, disable=None, desc=part.stem) as bar):
            if size_of(part) > have:
                f.truncate(have)
            while not want or at < want:
                block = memoryview(stream.read1(min(1 << 20, want - at) if want else 1 << 20))  # what there is
                if not block:
                    break
                new, at = block[max(0, have - at):], at + len(block)  # a server that ignores ranges gives all again
                write(f, new)
                have += len(new)
                bar.update(len(new))
    if have < want:
        raise ConnectionError(f"it ended after {have:,} of {want:,} bytes")


def write(f: BinaryIO, block: memoryview | bytes) -> None:
    """Write all of a block to an unbuffered file, as far as the disk allows."""
    while block:
        block = block[f.write(block):]


def size_of(part: Path) -> int:
    """Bytes in a file, 0 if it is not there."""
    return part.stat().st_size if part.exists() else 0


def keep_trying(attempt: Callable, url: str, path: Path, part: Path, tries: int = 8, pause: float = 1.0):
    """The value of attempt(), which is called until it ends without an error of the network; SystemExit at others.

    After the n-th failure in a row that adds nothing to `part`, it waits pause * 2^(n - 1) seconds, at most a minute.
    """
    failures = 0
    while True:
        before = size_of(part)
        try:
            return attempt()
        except (OSError, http.client.HTTPException) as e:
            code, why = getattr(e, "code", 0), getattr(e, "reason", None) or e
            if getattr(e, "errno", 0) in DISK:
                raise SystemExit(f"{part}: {e.strerror}. The {size_of(part):,} bytes that it holds are kept; make "
                                 f"room, then start again") from None
            if code in (401, 403):
                raise SystemExit(f"{url}: refused ({code} {why}): it asks for an account or a licence. Open it in a "
                                 f"browser, and put the file at {path} by hand") from None
            if code in (400, 404, 410) or isinstance(why, FileNotFoundError):
                raise SystemExit(f"{url}: can't be fetched: it is not there ({code or why}). Look for it on the site, "
                                 f"and put the file at {path} by hand") from None
            if code == 416:  # the part is longer than the file
                part.unlink(missing_ok=True)
            failures = 1 if size_of(part) > before else failures + 1
            if failures >= tries:
                raise SystemExit(f"{url}: can't be fetched: {failures} tries in a row failed ({why}). "
                                 f"{size_of(part):,} bytes are kept in {part}; look at the network, then start "
                                 f"again") from None
            time.sleep(min(60.0, pause * 2 ** (failures - 1)))


def fetch(url: str, path: str | Path, digest: str = "", size: int = 0, first: int = 0, last: int | None = None,
          sums: Path | None = None, timeout: float = 30.0, **patience) -> Path:
    """The file at an http(s) or file URL, or its bytes first:last; goes on with NAME.part if there is one.

    digest, size: the published ones of the whole, as far as known. sums: a file of JSON lines with the digests of what
    was fetched, so that the same URL must give the same again. timeout: seconds of silence that end a try. patience:
    tries and pause of `keep_trying`.
    """
    path = Path(path)
    if path.is_file():
        return path
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {url} into {path.parent}", file=sys.stderr)
    keep_trying(lambda: transfer(url, part, first, last, size, timeout), url, path, part, **patience)

    def refuse(why: str) -> None:
        part.unlink()
        part.with_name(part.name + ".json").unlink(missing_ok=True)
        raise SystemExit(f"{url}: {why}. What came is removed; start again, and if it is so again, look at the site")

    if size and not (first or last) and size_of(part) != size:
        refuse(f"{size_of(part):,} bytes came, but the published file has {size:,}")
    with open(part, "rb") as f:
        if f.read(512).lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
            refuse("a web page came instead of the file; the site may ask for an account or a licence")
    if digest or sums:
        algorithm = digest.partition(":")[0] or "sha256"
        found = f"{algorithm}:{file_digest(part, algorithm)}"
        if digest and found != digest:
            refuse(f"not the published file: {found} instead of {digest}")
    if sums:
        sums.parent.mkdir(parents=True, exist_ok=True)
        before = [json.loads(x) for x in sums.read_text().splitlines()] if sums.exists() else []
        other = [x for x in before if x["url"] == url and x["bytes"] == [first, last] and x["digest"] != found]
        if other:
            refuse(f"not the file that was fetched on {other[0]['date']}: {found} instead of {other[0]['digest']}; "
                   f"remove that line of {sums} to accept the new one")
        line = {"url": url, "bytes": [first, last], "digest": found, "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
        with open(sums, "a") as f:
            f.write(json.dumps(line) + "\n")
    os.replace(part, path)
    part.with_name(part.name + ".json").unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------- a piece of a tar
def border(url: str, at: int, whole: int, **how) -> int:
    """End of the first member of a tar that begins at or after byte `at`, a multiple of 512; `whole` if there is none.

    Not its beginning, since further headers (a long name, other attributes) may precede the member's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        while at < whole:
            window = fetch(url, Path(folder) / f"{at}", first=at, last=min(at + WINDOW, whole), **how).read_bytes()
            for i in range(0, len(window), 512):
                if window[i + 257:i + 262] == b"ustar":
                    with contextlib.suppress(tarfile.HeaderError):  # its checksum is compared
                        member = tarfile.TarInfo.frombuf(window[i:i + 512], "utf-8", "surrogateescape")
                        if member.type not in b"xgLK":
                            return min(at + i + 512 + -(-member.size // 512) * 512, whole)
            at += len(window)
    return whole


def fetch_tar_piece(url: str, path: str | Path, piece: int, n: int, sums: Path | None = None, **how) -> Path:
    """Piece `piece` of 0 … n-1 of an uncompressed tar of any size, as a tar by itself; all n together are the whole.

    A piece begins and ends between two members, near piece/n and (piece+1)/n of the file, so that an archive of
    terabytes can be taken in part. The server must give ranges of bytes.
    """
    path = Path(path)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)  # a piece may be empty

    def ask() -> int:
        stream, _, whole, _ = connect(url, 0, 512, "", how.get("timeout", 30.0))
        stream.close()
        return whole

    patience = {k: how[k] for k in ("tries", "pause") if k in how}
    whole = keep_trying(ask, url, path, path, **patience)
    ends = [whole * i // n // 512 * 512 for i in (piece, piece + 1)]
    first, last = (0 if i == 0 else whole if i == n else border(url, end, whole, **how)
                   for i, end in zip((piece, piece + 1), ends))
    members = path.with_name(path.name + ".members")
    if first < last:
        fetch(url, members, first=first, last=last, sums=sums, **how)

    def end() -> None:
        with open(members, "ab", buffering=0) as f:
            f.truncate(last - first)
            write(f, bytes(1024))  # the mark of a tar's end

    keep_trying(end, url, path, members)
    os.replace(members, path)
    return path


# ---------------------------------------------------------------- archives
def extract(archive: Path, folder: Path, within: str = "") -> None:
    """The files of a zip or tar whose path contains `within`, as a flat folder that exists only when it is whole.

    SystemExit if the archive is damaged or holds no such files, or two of one name.
    """
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            source = zipfile.ZipFile(archive)
            members = [(m.filename, lambda m=m: source.open(m)) for m in source.infolist() if not m.is_dir()]
        else:
            source = tarfile.open(archive)
            members = [(m.name, lambda m=m: source.extractfile(m)) for m in source if m.isfile()]
        with source:
            for name, opened in members:
                target = new / os.path.basename(name)
                if within in name and not target.name.startswith(".") and not name.startswith("__MACOSX"):
                    with opened() as content, open(target, "xb") as f:
                        shutil.copyfileobj(content, f)
        if not any(new.iterdir()):
            raise ValueError(f"there are no files {within!r} in it")
    except (OSError, ValueError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
            tarfile.TarError) as e:  # RuntimeError: it is encrypted
        shutil.rmtree(new)
        raise SystemExit(f"{archive}: can't be unpacked into {folder} ({e}). If the disk is full, make room; else "
                         f"remove the archive. Then start again") from None
    new.rename(folder)
