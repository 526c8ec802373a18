"""slam.checkpoint."""
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slam.embedded import resolve
from slam.units import Fingerprint, published_fingerprint, read_pairs, same_units

SLAMKIT = "speech_language_model"  # model_type of SlamKit's checkpoints


def read_folder(name: str) -> tuple[dict, dict[str, Tensor]]:
    """config.json and weights of a model name, SlamKit's layout unwrapped. SystemExit if they are not whole."""
    folder = fetch(name)
    try:
        config, state = json.loads((folder / "config.json").read_text()), read_weights(folder)
        if config.get("model_type") == SLAMKIT:
            config = config["base_config"] | {"vocab_size": config["vocab_size"]}
            state = {k.removeprefix("lm."): v for k, v in state.items()}
    except (OSError, ValueError, KeyError) as e:
        raise SystemExit(f"{name}: not a whole checkpoint folder: {e}") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError) as e:  # of a truncated file
        raise SystemExit(f"{name}: damaged weights ({e}); copy or train it again") from None
    return config, state


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, from one file or shards, safetensors or (read without running code) pickle."""
    for stem, load in (("model.safetensors", load_file),
                       ("pytorch_model.bin", lambda path: torch.load(path, map_location="cpu", weights_only=True))):
        index = folder / f"{stem}.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [stem]
        if not index.is_file() and not (folder / stem).is_file():
            continue
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{name} is missing")
        return {k: v for name in names for k, v in load(folder / name).items()}
    raise FileNotFoundError("model.safetensors is missing")


def write_folder(folder: str | Path, config: dict, state: dict[str, Tensor], slam: dict | None = None,
                 trainer: dict | None = None) -> None:
    """Write a checkpoint folder beside `folder`, then swap it in. OSError if it can't be written; the old one stays."""
    folder = Path(folder).resolve()
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if slam is not None:
            (new / "slam.json").write_text(json.dumps(slam, indent=2) + "\n")
        if trainer is not None:
            torch.save(trainer, new / "trainer.pt")
        save_file({k: v.detach().contiguous() for k, v in state.items()}, new / "model.safetensors",
                  metadata={"format": "pt"})
    except (OSError, SafetensorError, RuntimeError) as e:  # safetensors and torch.save wrap an OSError in their own
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"{folder}: could not be written ({e})") from e
    swap_in(new, folder)


def swap_in(new: Path, folder: Path) -> None:
    """Put the finished folder `new` in the place of `folder`; `recover` mends a kill between the two renames."""
    recover(folder)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """After a kill between `swap_in`'s two renames: bring the old checkpoint back."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def find_checkpoint(name: str) -> str:
    """A run folder -> its checkpoint folder; a checkpoint folder or hub id -> itself."""
    inner = Path(name) / "checkpoint"
    return str(inner) if inner.is_dir() or inner.with_name("checkpoint.old").is_dir() else name


def fetch(name: str) -> Path:
    """Local folder of a model name; a hub id is downloaded into Hugging Face's own cache first."""
    folder = Path(name).resolve()
    old = folder.with_name(folder.name + ".old")
    if old.is_dir() and not folder.exists():  # killed, or just now, between swap_in's renames; reading mends nothing
        return old
    source = resolve(name)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # OPT and MobileLLM were published before that format
            snapshot_download(source, allow_patterns=["pytorch_model*.bin"])
        return folder
    except Exception as e:  # huggingface_hub raises a dozen types here; to the user they are one
        raise SystemExit(f"{name}: no such folder here, and not to be had from the Hugging Face hub "
                         f"({type(e).__name__}); check the name and the network") from None


def weights_sha256(name: str) -> str:
    """sha256 of a checkpoint folder's weights."""
    digest = hashlib.sha256()
    for file in sorted(p for p in fetch(name).iterdir() if p.suffix in (".safetensors", ".bin")):
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def checkpoint_fingerprint(name: str) -> Fingerprint:
    """Fingerprint of the units that a checkpoint speaks. SystemExit if it is not a whole unit LM's.

    SlamKit's checkpoints do not name their tokeniser: they are taken to speak the published one's units.
    """
    folder = fetch(name)
    if (folder / "slam.json").is_file():
        return Fingerprint.of(json.loads((folder / "slam.json").read_text())["fingerprint"])
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if config.get("model_type") == SLAMKIT:
        return published_fingerprint(config["vocab_size"])
    raise SystemExit(f"{folder / 'slam.json'}: missing; {name} is no whole checkpoint of train.py, dpo.py or SlamKit")


def newest_checkpoint(root: str = "out", stage: str = "") -> str:
    """The run folder below `root` with the newest finished checkpoint, of that stage. SystemExit if there is none."""
    found = []
    for path in Path(root).rglob("checkpoint/slam.json"):
        slam = json.loads(path.read_text())
        if slam.get("finished") and stage in ("", slam.get("stage")):
            found.append((path.stat().st_mtime, str(path.parent.parent)))
    if not found:
        raise SystemExit(f"no finished {stage + ' ' if stage else ''}checkpoint under {root}/; train one (bash "
                         f"runs/demo.sh) or name one with --checkpoint")
    return max(found)[1]


def sha256_of(*what) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def newest_pairs(checkpoint: str) -> str:
    """The newest pairs_train.jsonl under out/ of a checkpoint's units, not of a model's own continuations (`pairs`).

    SystemExit if there is none.
    """
    fingerprint = checkpoint_fingerprint(find_checkpoint(checkpoint))
    for path in sorted(Path("out").rglob("pairs_train.jsonl"), key=lambda p: -p.stat().st_mtime):
        if not path.with_name("candidates.jsonl").exists() and same_units(read_pairs(path)[0], fingerprint):
            return str(path)
    raise SystemExit(f"no pairs_train.jsonl under out/ of the units of {checkpoint}; make one (synth_stories.py "
                     f"config/spoken_swag.py) or name one with --pairs")
