"""Audio in, whatever it is: any file that libsndfile reads, out of folders, archives, lists and parquet files.

Everything is read as blocks of mono float32 at 16 kHz, so memory does not grow with the length of a file. A file that
holds nothing to use is a ValueError that says why, never a traceback.
"""
import lzma
import math
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO

import numpy as np
import soundfile

SAMPLE_RATE = 16_000  # of every encoder here


# What libsndfile reads, and last what it does not: such files are to be missed in the report, not in silence.
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf",
                  ".sph", ".w64", ".rf64", ".m4a", ".aac", ".wma", ".webm", ".mp4")


ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


LIST_SUFFIXES = (".txt", ".lst", ".list")


SILENCE = 1e-4  # peak of a silent recording, -80 dB


MIN_SAMPLES = SAMPLE_RATE // 25  # one unit


# ---------------------------------------------------------------- samples
def resample(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Polyphase resampling of (T,) float32 from `rate` to `to` Hz, with scipy's anti-aliasing filter."""
    if rate == to:
        return wave
    from scipy.signal import resample_poly
    g = math.gcd(rate, to)
    return resample_poly(wave, to // g, rate // g).astype(np.float32)


def resample_blocks(blocks: Iterable[np.ndarray], rate: int, to: int) -> Iterator[np.ndarray]:
    """`resample` of a stream: what comes out, joined, is `resample` of what went in, joined."""
    if rate == to:
        yield from blocks
        return
    up, down = to // math.gcd(rate, to), rate // math.gcd(rate, to)
    # scipy's filter sees 10 * max(up, down) / up samples to each side. Borders lie at multiples of `down` samples,
    # where a sample of the output falls upon one of the input.
    context = math.ceil((10 * max(up, down) / up + 1) / down) * down
    held, left = np.zeros(0, np.float32), 0  # `left` samples of it have gone out already
    for block in blocks:
        held = np.concatenate([held, block])
        new = (len(held) - left - context) // down * down
        if new > 0:
            yield resample(held[:left + new + context], rate, to)[left * up // down:(left + new) * up // down]
            start = max(0, left + new - context)
            held, left = held[start:], left + new - start
    if len(held) > left:
        yield resample(held, rate, to)[left * up // down:]


def check_wave(wave: np.ndarray, name="audio") -> None:
    """ValueError, naming the audio, if (T,) samples at 16 kHz hold nothing that a tokeniser could hear."""
    if not np.isfinite(wave).all():
        raise ValueError(f"{name}: holds NaN or infinite samples; export it again")
    check_extent(len(wave), np.abs(wave).max(initial=0), name)


def check_extent(n_samples: int, peak: float, name) -> None:
    """ValueError, naming the audio, if so much at 16 kHz is too short or too quiet to hold speech."""
    if n_samples < MIN_SAMPLES:
        raise ValueError(f"{name}: {1000 * n_samples / SAMPLE_RATE:.0f} ms of audio; a unit needs at least 40 ms")
    if peak < SILENCE:
        raise ValueError(f"{name}: silent (peak below -80 dB); record it again")


def read_blocks(source: str | Path | BinaryIO, name=None, seconds: float = 10.0) -> Iterator[np.ndarray]:
    """A file, or an open one, as mono float32 blocks at 16 kHz. ValueError, naming it, if it is damaged or no audio."""
    name = name or source
    try:
        if not isinstance(source, (str, Path)):
            source = ForLibsndfile(source)
        elif problem := path_problem(source):
            raise ValueError(f"{name}: {problem}")
        elif os.name == "posix":
            source = os.fsencode(source)  # a name need not be UTF-8
        with soundfile.SoundFile(source) as f:
            if f.frames == 2 ** 63 - 1:
                raise ValueError(f"{name}: does not say how long it is, as if written to a pipe; convert it again")
            if not 1000 <= f.samplerate <= 1_000_000:
                raise ValueError(f"{name}: a sample rate of {f.samplerate} Hz; its header is damaged")
            yield from resample_blocks(mono(f, name, seconds), f.samplerate, SAMPLE_RATE)
    except (soundfile.SoundFileError, TypeError) as e:  # TypeError: raw samples, of which it would have to be told more
        reason = getattr(e, "error_string", str(e)).strip(" .:")
        raise ValueError(f"{name}: not readable as audio ({reason}); wav, flac, ogg and mp3 are") from None
    except OSError as e:
        raise ValueError(f"{name}: not readable ({e.strerror})") from None


class ForLibsndfile:
    """An open file whose seeks never raise: damaged ones are sought before their beginning, out of C's reach."""

    def __init__(self, file: BinaryIO):
        self.tell, self.readinto, self._seek = file.tell, file.readinto, file.seek

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._seek(offset, whence)
        except (ValueError, OSError):
            return -1


def mono(f: soundfile.SoundFile, name, seconds: float) -> Iterator[np.ndarray]:
    """The samples of an open file, its channels averaged. ValueError if they are not finite, or fewer than promised."""
    n = 0
    while len(block := f.read(round(seconds * f.samplerate), dtype="float32", always_2d=True)):
        n += len(block)
        block = block.mean(1)
        if not np.isfinite(block).all():
            raise ValueError(f"{name}: holds NaN or infinite samples; export it again")
        yield block
    # libsndfile opens a wav cut short by a broken copy and only notes what its header promised; 2 or 4 GB is what a
    # program promises that writes into a pipe.
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", f.extra_info)
    if n < f.frames or cut and int(cut[2]) < int(cut[1]) < 0x7FFFF000:
        raise ValueError(f"{name}: truncated: it holds less audio than its header promises; copy it again")


def load_audio(source: str | Path | BinaryIO, name=None) -> np.ndarray:
    """Any libsndfile file as mono float32 (T,) at 16 kHz. ValueError naming the file if there is nothing to use."""
    wave = np.concatenate([np.zeros(0, np.float32), *read_blocks(source, name)])
    check_wave(wave, name or source)
    return wave


def split_at_silences(blocks: Iterable[np.ndarray], max_seconds: float) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Cut a stream into utterances (first sample, blocks), none longer than `max_seconds`; 0: the stream is one.

    A cut is made in the middle of the quietest 0.3 s between half of `max_seconds` and the whole, as long as more
    than `max_seconds` is left; nothing is dropped, so pauses stay in the speech as the model will hear it.
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


# ---------------------------------------------------------------- where it comes from
@dataclass
class Item:
    """One recording of an input."""
    id: str  # its path below the input
    source: str | BinaryIO = ""  # a path, or an open file
    text: str | None = None  # what is said in it, if known
    problem: str = ""  # why it can't be read, if that is known already
    fatal: bool = False  # with it an unknown number of others is lost
    path: str = ""  # the file that it is, or is in


def path_problem(path: str | Path) -> str:
    """Why there is nothing to open at `path`; empty if there is."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        return "broken symlink"
    if not path.is_file():
        return "no such audio file"
    return "" if path.stat().st_size else "empty file"


def walk(folder: str | Path) -> list[str]:
    """All files below a folder, sorted; linked folders are followed, but none is entered twice."""
    def refuse(error: OSError):
        raise SystemExit(f"{error.filename}: not readable ({error.strerror})")

    found, entered = [], {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [f for f in sorted(folders) if (real := os.path.realpath(os.path.join(here, f))) not in entered
                      and not entered.add(real)]
        found += [os.path.join(here, name) for name in names]
    return sorted(found)


def is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES) and not os.path.basename(name).startswith("._")  # macOS's shadows


def transcripts(name: str, content: bytes) -> dict[str, str]:
    """What a text file says of the audio beside it: {path without suffix: text}, LibriSpeech's .trans.txt or .txt."""
    text = content.decode("utf-8", "replace")
    if not name.endswith(".trans.txt"):
        return {name.removesuffix(".txt"): text.strip()}
    lines = (line.partition(" ") for line in text.splitlines() if line.strip())
    return {os.path.join(os.path.dirname(name), id): said.strip() for id, _, said in lines}


def read_input(input: str, text: bool = False, audio_column: str = "audio",
               part: tuple[int, int] = (0, 1)) -> tuple[int | None, Iterator[Item]]:
    """How many recordings an input has, if that is known without reading it, and these, in an order that is its own.

    input: a folder (searched recursively), an audio file, a tar archive, a parquet file, or a list of paths, one a
    line. A folder without audio may hold archives and parquet files. text: find what is said, too. part: (i, n), one
    of n equal shares, which a recording's name decides, or that of its archive where there are n or more of these.
    SystemExit if there is nothing to read.
    """
    def wanted(id: str) -> bool:
        return zlib.crc32(id.encode("utf-8", "surrogateescape")) % part[1] == part[0]

    if not input or not os.path.exists(input):
        raise SystemExit(f"--input={input}: no such folder or file; give a folder of audio files")
    lower = input.lower()
    if os.path.isdir(input):
        files = walk(input)
        audio = [f for f in files if is_audio(f)]
        whole = [f for f in files if f.lower().endswith((*ARCHIVE_SUFFIXES, ".parquet"))]
        if audio:
            if whole:
                print(f"{input}: its {len(whole)} archives are left alone, as there are audio files beside them")
            found = [(f, id) for f in audio if wanted(id := os.path.relpath(f, input))]
            return len(found), path_items(found, [f for f in files if text and f.lower().endswith(".txt")])
        if not whole:
            raise SystemExit(f"{input}: no audio files in it ({', '.join(AUDIO_SUFFIXES)}), nor archives of them")
        prefixes = {f: os.path.relpath(f, input) + "/" for f in whole}
        if len(whole) >= part[1]:
            whole, mine = [f for f in whole if wanted(prefixes[f])], lambda id: True
        else:
            mine = wanted
        return None, (item for f in whole for item in read_archive(f, prefixes[f], text, audio_column, mine))
    if is_audio(input):
        found = [(input, os.path.basename(input))] * wanted(os.path.basename(input))
        return len(found), path_items(found, text_files(input) if text else [])
    if lower.endswith(LIST_SUFFIXES):
        names = [line for line in Path(input).read_text(encoding="utf-8", errors="surrogateescape").split("\n") if line]
        found = [(os.path.join(os.path.dirname(input), name), name) for name in names if wanted(name)]
        return len(found), path_items(found, sorted({f for path, _ in found for f in text_files(path)} if text else ()))
    if lower.endswith((*ARCHIVE_SUFFIXES, ".parquet")):
        return None, read_archive(input, "", text, audio_column, wanted)
    raise SystemExit(f"{input}: neither a folder nor audio, an archive ({', '.join(ARCHIVE_SUFFIXES)}), a .parquet "
                     f"file or a list of paths ({', '.join(LIST_SUFFIXES)})")


def path_items(found: list[tuple[str, str]], texts: list[str]) -> Iterator[Item]:
    """Items of (path, id), with what is said in them by the text files. SystemExit if one of these can't be read."""
    said = {}
    for path in texts:
        try:
            said |= transcripts(path, Path(path).read_bytes())
        except OSError as e:
            raise SystemExit(f"{path}: not readable ({e.strerror})") from None
    yield from (Item(id, path, said.get(os.path.splitext(path)[0]), path=path) for path, id in found)


def text_files(path: str) -> list[str]:
    """Text files beside an audio file that may say what is said in it."""
    folder, name = os.path.split(os.path.splitext(path)[0])
    return [f for f in (os.path.join(folder, name + ".txt"),
                        os.path.join(folder, name.rpartition("-")[0] + ".trans.txt")) if os.path.isfile(f)]


def read_archive(path: str, prefix: str, text: bool, audio_column: str, wanted: Callable) -> Iterator[Item]:
    if path.lower().endswith(".parquet"):
        return read_parquet(path, prefix, text, audio_column, wanted)
    return read_tar(path, prefix, text, wanted)


def read_tar(path: str, prefix: str, text: bool, wanted: Callable) -> Iterator[Item]:
    """The audio of a tar archive, compressed or not, read as a stream; for texts it is read through once before."""
    said = {}
    if text:
        for _, member, file in members(path, lambda name: name.endswith(".txt")):
            said |= transcripts(member, file.read()) if file else {}
    for problem, member, file in members(path, lambda name: is_audio(name) and wanted(prefix + name)):
        fatal = problem.startswith(UNFINISHED)
        yield Item(prefix + member if member else path, file, said.get(os.path.splitext(member)[0]), problem, fatal,
                   path)


UNFINISHED = "can't be read to its end"


class Header(tarfile.TarInfo):
    """A member's header. EOFError where tarfile would take a missing or a damaged one for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
        try:
            return super().fromtarfile(tar)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as e:
            raise EOFError(e) from None


def members(path: str, wanted: Callable) -> Iterator[tuple[str, str, BinaryIO | None]]:
    """(problem, name, open file) of each file in a tar archive whose name is wanted."""
    name = ""
    try:
        with tarfile.open(path, "r:*", tarinfo=Header) as tar:
            for member in tar:
                tar.members = []  # it would keep all of them
                if member.isdir() or not wanted(member.name):
                    continue
                name = member.name
                if not member.isfile():
                    yield "a link inside the archive", name, None
                    continue
                file = tempfile.SpooledTemporaryFile(max_size=64 << 20)  # read when the archive is further on
                copyfileobj(tar.extractfile(member), file)
                size = file.tell()
                file.seek(0)
                if size < member.size:
                    raise EOFError
                yield ("", name, file) if size else ("empty file", name, None)
                name = ""
            while tar.fileobj.read(1 << 20):  # so that a compressed file's checksum is looked at
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as e:
        yield f"{UNFINISHED} ({str(e).strip() or 'it ends early'}); the rest of {path} is lost", name, None


def read_parquet(path: str, prefix: str, text: bool, audio_column: str, wanted: Callable) -> Iterator[Item]:
    """Rows of a Hugging Face parquet file with an audio column {bytes, path}; its `text` column, if there is one."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SystemExit(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    import io
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if audio_column not in names:
                raise SystemExit(f"{path}: no column {audio_column!r}; it has {', '.join(names)} (--audio_column)")
            if not pyarrow.types.is_struct(file.schema_arrow.field(audio_column).type):
                raise SystemExit(f"{path}: {audio_column!r} is not a column of audio, {{bytes, path}}")
            columns = [audio_column] + ["text"] * (text and "text" in names)
            for batch in file.iter_batches(16, columns=columns):
                for record in batch.to_pylist():
                    audio = record[audio_column] or {}
                    content = audio.get("bytes") or b""
                    name = f"{row:07d}" + ("_" + os.path.basename(audio["path"]) if audio.get("path") else "")
                    row += 1
                    id = (prefix or os.path.basename(path) + "/") + name
                    if wanted(id):
                        yield Item(id, io.BytesIO(content), record.get("text"),
                                   "" if content else "no audio in this row", path=path)
    except (pyarrow.ArrowException, OSError) as e:
        problem = f"{UNFINISHED} ({str(e).splitlines()[0]})"
        yield Item(prefix.rstrip("/") or path, problem=problem, fatal=True, path=path)
