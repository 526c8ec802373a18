"""Audio input: any file that libsndfile reads, from folders, archives, parquet files and lists of paths.

    for item in read_input("my_speech")[1]:
        wave = load_audio(item.source, item.id)   # (T,) float32, mono, 16 kHz; ValueError if it can't be used
"""
import io
import lzma
import math
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO

import numpy as np

SAMPLE_RATE = 16_000  # Hz, of every encoder here
# The formats of libsndfile, then some that it cannot read: these are reported as unreadable, not passed over.
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf",
                  ".sph", ".w64", ".rf64", ".m4a", ".aac", ".wma", ".webm", ".mp4")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".parquet")
LIST_SUFFIXES = (".txt", ".lst", ".list")
SILENCE = 1e-4  # peak of a silent recording, -80 dB
MIN_SAMPLES = SAMPLE_RATE // 25  # one unit


# ---------------------------------------------------------------- samples
def resample(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Resample (T,) float32 from `rate` to `to` Hz, with scipy's polyphase anti-aliasing filter."""
    if rate == to:
        return wave
    from scipy.signal import resample_poly
    g = math.gcd(rate, to)
    return resample_poly(wave, to // g, rate // g).astype(np.float32)


def resample_blocks(blocks: Iterable[np.ndarray], rate: int, to: int) -> Iterator[np.ndarray]:
    """Resample a stream of blocks (T,): the joined output equals `resample` of the joined input."""
    up, down = to // math.gcd(rate, to), rate // math.gcd(rate, to)
    # scipy's filter needs 10 * max(up, down) / up input samples on each side. Blocks are cut at multiples of `down`
    # input samples, where an output sample coincides with an input sample.
    context = math.ceil((10 * max(up, down) / up + 1) / down) * down
    held, left = np.zeros(0, np.float32), 0  # the first `left` samples of `held` were output already: left context
    for block in blocks:
        held = np.concatenate([held, block])
        new = (len(held) - left - context) // down * down
        if new > 0:
            yield resample(held[:left + new + context], rate, to)[left * up // down:(left + new) * up // down]
            start = max(0, left + new - context)
            held, left = held[start:], left + new - start
    if len(held) > left:
        yield resample(held, rate, to)[left * up // down:]


def unusable(n_samples: int, peak: float) -> str:
    """Why audio of `n_samples` at 16 kHz with this peak can't be tokenised; empty if it can."""
    if not math.isfinite(peak):
        return "holds NaN or infinite samples; export it again"
    if n_samples < MIN_SAMPLES:
        return f"{1000 * n_samples / SAMPLE_RATE:.0f} ms of audio; a unit needs at least 40 ms"
    return "silent (peak below -80 dB); record it again" if peak < SILENCE else ""


def check_wave(wave: np.ndarray, name="audio") -> None:
    """ValueError that names the audio if (T,) samples at 16 kHz are `unusable`."""
    if problem := unusable(len(wave), np.abs(wave).max(initial=0)):
        raise ValueError(f"{name}: {problem}")


class ForLibsndfile:
    """An open file whose `seek` returns -1 instead of raising: libsndfile's C code cannot handle an exception."""

    def __init__(self, file: BinaryIO):
        self.tell, self.readinto, self.file = file.tell, file.readinto, file

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self.file.seek(offset, whence)
        except (ValueError, OSError):  # a damaged header may point to before the file's beginning
            return -1


def read_blocks(source: str | Path | BinaryIO, name=None, seconds: float = 10.0) -> Iterator[np.ndarray]:
    """Read a path or an open file as mono float32 blocks (T,) at 16 kHz, decoded `seconds` at a time.

    ValueError that names the file if it is missing, damaged, not audio, or holds samples that are not finite.
    """
    import soundfile
    name = name or source
    try:
        if not isinstance(source, (str, Path)):
            source = ForLibsndfile(source)
        elif not os.path.isfile(source):
            raise ValueError(f"{name}: {'broken symlink' if os.path.islink(source) else 'no such audio file'}")
        elif not os.path.getsize(source):
            raise ValueError(f"{name}: empty file")
        else:
            source = os.fsencode(source) if os.name == "posix" else source  # a name need not be UTF-8
        with soundfile.SoundFile(source) as f:
            if not 1000 <= f.samplerate <= 1_000_000:
                raise ValueError(f"{name}: a sample rate of {f.samplerate} Hz; its header is damaged")
            yield from resample_blocks(mono(f, name, seconds), f.samplerate, SAMPLE_RATE)
    except (soundfile.SoundFileError, TypeError) as e:  # TypeError: raw samples, whose format is not known
        reason = getattr(e, "error_string", str(e)).strip(" .:")
        raise ValueError(f"{name}: not readable as audio ({reason}); wav, flac, ogg and mp3 are") from None
    except OSError as e:
        raise ValueError(f"{name}: not readable ({e.strerror})") from None


def mono(f, name, seconds: float) -> Iterator[np.ndarray]:
    """Blocks (T,) of an open SoundFile, channels averaged; ValueError if samples are not finite or missing."""
    n = 0
    while len(block := f.read(round(seconds * f.samplerate), dtype="float32", always_2d=True)):
        n += len(block)
        block = block.mean(1)
        if not np.isfinite(block).all():
            raise ValueError(f"{name}: holds NaN or infinite samples; export it again")
        yield block
    # libsndfile opens a wav that was cut short, and only its log tells the length that the header promised. Programs
    # that write to a pipe promise 2 or 4 GB; such files are whole.
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", f.extra_info)
    if n < f.frames or cut and int(cut[2]) < int(cut[1]) < 0x7FFFF000:
        raise ValueError(f"{name}: truncated: its header promises more audio, or no length; copy or convert it again")


def load_audio(source: str | Path | BinaryIO, name=None) -> np.ndarray:
    """Read any libsndfile file as mono float32 (T,) at 16 kHz; ValueError that names it if it can't be used."""
    wave = np.concatenate([np.zeros(0, np.float32), *read_blocks(source, name)])
    check_wave(wave, name or source)
    return wave


def split_at_silences(blocks: Iterable[np.ndarray], max_seconds: float) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Cut a stream at 16 kHz into utterances (first sample, blocks) of at most `max_seconds`; 0: do not cut.

    While more than `max_seconds` is left, a cut is made in the middle of the quietest 0.3 s between half of
    `max_seconds` and the whole. No sample is dropped.
    """
    if not max_seconds:
        yield 0, iter(blocks)
        return
    longest, step, start = round(max_seconds * SAMPLE_RATE), SAMPLE_RATE // 50, 0
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > longest:
            later = held[longest // 2:longest]
            energy = np.square(later[:len(later) // step * step]).reshape(-1, step).sum(1)
            cut = longest // 2 + round((np.convolve(energy, np.ones(15), "valid").argmin() + 7.5) * step)
            yield start, iter([held[:cut]])
            held, start = held[cut:], start + cut
    if len(held):
        yield start, iter([held])


# ---------------------------------------------------------------- inputs
@dataclass
class Item:
    """One recording of an input."""
    id: str  # its path below the input
    source: str | BinaryIO = ""  # a path, or an open file
    problem: str = ""  # why it can't be read, if that is known already
    fatal: bool = False  # an unknown number of other recordings is lost with it


def walk(folder: str | Path) -> list[str]:
    """All files below a folder, sorted; linked folders are followed, but none is entered twice."""
    def refuse(error: OSError):
        raise SystemExit(f"{error.filename}: not readable ({error.strerror})")

    found, entered = [], set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(here)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        found += [os.path.join(here, name) for name in names]
    return sorted(found)


def is_audio(name: str) -> bool:
    """Whether a name ends like an audio file's; not macOS's `._` shadow files."""
    return name.lower().endswith(AUDIO_SUFFIXES) and not os.path.basename(name).startswith("._")


def read_input(input: str, audio_column: str = "audio",
               part: tuple[int, int] = (0, 1)) -> tuple[int | None, Iterator[Item]]:
    """The number of recordings (None if only reading them tells it) and the recordings, always in the same order.

    input: a folder (searched recursively), an audio file, a tar archive, a parquet file, or a list of paths, one a
    line. A folder's archives are read if it holds no audio files. part: (i, n), this process's share: every n-th
    archive, or if there are fewer than n, recordings by their ids. SystemExit if there is nothing to read.
    """
    def wanted(id: str) -> bool:
        return zlib.crc32(id.encode("utf-8", "surrogateescape")) % part[1] == part[0]

    listed = input.lower().endswith(LIST_SUFFIXES)
    if not input or not os.path.exists(input):
        raise SystemExit(f"--input={input}: no such folder or file; give a folder of audio files")
    if os.path.isdir(input):
        found, listed = [(f, os.path.relpath(f, input)) for f in walk(input)], False
    elif listed:
        names = Path(input).read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
        found = [(os.path.join(os.path.dirname(input), name), name) for name in names if name]
    else:
        found = [(input, os.path.basename(input))]
    audio = found if listed else [(f, id) for f, id in found if is_audio(f)]
    archives = {f: id + "/" if os.path.isdir(input) else "" for f, id in found if f.lower().endswith(ARCHIVE_SUFFIXES)}
    if audio or listed:
        if archives and not listed:
            print(f"{input}: its {len(archives)} archives are not read, as there are audio files beside them")
        items = [Item(id, f) for f, id in audio if wanted(id)]
        return len(items), iter(items)
    if not archives:
        raise SystemExit(f"{input}: no audio files here ({', '.join(AUDIO_SUFFIXES)}), no archives "
                         f"({', '.join(ARCHIVE_SUFFIXES)}), and not a list of paths ({', '.join(LIST_SUFFIXES)})")
    mine = wanted
    if len(archives) >= part[1] > 1:
        archives, mine = dict([*archives.items()][part[0]::part[1]]), lambda id: True
    return None, chain.from_iterable(
        read_parquet(f, prefix, audio_column, mine) if f.lower().endswith(".parquet") else read_tar(f, prefix, mine)
        for f, prefix in archives.items())


class Header(tarfile.TarInfo):
    """A member's header; EOFError if it is missing or damaged, where tarfile would see the archive's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
        try:
            return super().fromtarfile(tar)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as e:
            raise EOFError(e) from None


def read_tar(path: str, prefix: str, wanted: Callable) -> Iterator[Item]:
    """Recordings of a tar archive, compressed or not, read as a stream. The last is fatal if the archive is damaged."""
    name = ""
    try:
        with tarfile.open(path, "r:*", tarinfo=Header) as tar:
            for member in tar:
                tar.members = []  # tarfile would keep the headers of all members in memory
                if member.isdir() or not (is_audio(member.name) and wanted(prefix + member.name)):
                    continue
                name = member.name
                file = tempfile.SpooledTemporaryFile(max_size=64 << 20)  # a copy, as the archive is read on meanwhile
                if member.isfile():
                    copyfileobj(tar.extractfile(member), file)
                    file.seek(0)
                problem = "" if member.isfile() else "a link inside the archive"
                yield Item(prefix + name, file, problem)
                name = ""
            while tar.fileobj.read(1 << 20):  # the rest, so that the checksum of a compressed file is checked
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as e:
        problem = f"can't be read to its end ({str(e).strip() or 'it ends early'}); the rest of {path} is lost"
        yield Item(prefix + name if name else path, problem=problem, fatal=True)


def parquet_rows(path: str | Path, columns: list[str], optional: tuple[str, ...] = (),
                 hint: str = "") -> Iterator[dict]:
    """Rows of a parquet file, with those of the `optional` columns that it has.

    SystemExit (with the hint) if a column or pyarrow is missing, OSError or ValueError if the file is damaged.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SystemExit(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        if missing := sorted(set(columns) - set(names)):
            raise SystemExit(f"{path}: no column {', '.join(missing)}{hint}; it has {', '.join(names)}")
        for batch in file.iter_batches(16, columns=columns + [x for x in optional if x in names]):
            yield from batch.to_pylist()


def read_parquet(path: str, prefix: str, audio_column: str, wanted: Callable) -> Iterator[Item]:
    """Rows of a Hugging Face parquet file whose `audio_column` holds {bytes, path}."""
    try:
        for row, record in enumerate(parquet_rows(path, [audio_column], hint=" (--audio_column)")):
            audio = record[audio_column] or {}
            if not isinstance(audio, dict):
                raise SystemExit(f"{path}: its column {audio_column!r} does not hold audio, {{bytes, path}}; name "
                                 f"another with --audio_column")
            name = f"{row:07d}" + ("_" + os.path.basename(audio["path"]) if audio.get("path") else "")
            id = (prefix or os.path.basename(path) + "/") + name
            if wanted(id):
                content = audio.get("bytes") or b""
                yield Item(id, io.BytesIO(content), "" if content else "no audio in this row")
    except (OSError, ValueError) as e:  # pyarrow's own errors are subclasses of these
        problem = f"can't be read to its end ({str(e).splitlines()[0]})"
        yield Item(prefix.rstrip("/") or path, problem=problem, fatal=True)
