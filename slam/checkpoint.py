"""Checkpoint folders: read them (ours, SlamKit's, transformers', the hub's), write them whole, find the newest.

A checkpoint is an ordinary Hugging Face folder, config.json and model.safetensors, with two files of our own:
    slam.json     stage, fingerprint of the units, step, tokens, seconds, finished, config, inputs
    trainer.pt    what a resumed run needs: state of the optimiser, losses since the last log line
"""
import contextlib
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slam.embedded import file_digest, resolve
from slam.units import Fingerprint, newest_first, published_fingerprint, read_pairs, same_units, write_atomic

SLAMKIT = "speech_language_model"  # model_type of SlamKit's checkpoints
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", "decoder.version")  # not weights


# ---------------------------------------------------------------- read
def read_folder(name: str) -> tuple[dict, dict[str, Tensor]]:
    """config.json and weights of a model by name; SlamKit's layout and old names are translated.

    name: hub id, run or model folder, or `embedded:NAME`. SystemExit if the folder is missing, partial or damaged.
    """
    folder = fetch(name)
    try:
        config, state = json.loads((folder / "config.json").read_text()), read_weights(folder)
        if config.get("model_type") == SLAMKIT:
            config = config["base_config"] | {"vocab_size": config["vocab_size"]}
            state = {k.removeprefix("lm."): v for k, v in state.items()}
    except (OSError, ValueError, KeyError) as e:
        raise SystemExit(f"{name}: not a whole checkpoint folder: {e}") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as e:  # raised for a truncated file
        raise SystemExit(f"{name}: damaged weights ({e}); copy or train it again") from None
    state = {k: v for k, v in state.items() if not k.endswith(BUFFERS)}
    return config, {f"model.{k}" if k.startswith("decoder.") else k: v for k, v in state.items()}  # OPT's old names


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder by name, from safetensors or pickle (which runs no code), one file or shards.

    Raises FileNotFoundError, naming the file, if one is missing.
    """
    load_pickle = partial(torch.load, map_location="cpu", weights_only=True)
    for stem, load in (("model.safetensors", load_file), ("pytorch_model.bin", load_pickle)):
        index, names = folder / f"{stem}.index.json", [stem]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.is_file() or (folder / stem).is_file():
            return {k: v for name in names for k, v in load(folder / name).items()}
    raise FileNotFoundError("model.safetensors is missing")


def load_weights(lm: torch.nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Copy `state` into the model. SystemExit, with `name`, for a weight missing, left over or of another shape."""
    own = lm.state_dict()  # these tensors share their memory with the parameters
    expected = {k: tuple(v.shape) for k, v in own.items()}
    found = {k: tuple(v.shape) for k, v in state.items() if k in own or k != "lm_head.weight"}  # unused if tied
    if found != expected:
        missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        other = [f"{k} {found[k]} instead of {v}" for k, v in expected.items() if found.get(k, v) != v]
        raise SystemExit(f"{name}: weights do not fit config.json: missing {missing[:3]}, "
                         f"unexpected {unexpected[:3]}, of another shape {other[:3]}")
    for k, v in own.items():
        v.copy_(state[k])


def fetch(name: str) -> Path:
    """Local folder of a model: a run's checkpoint, a folder, or a hub id's in the hub's cache. SystemExit if none."""
    here = Path(name).resolve()
    places = Path(name, "checkpoint"), Path(name, "checkpoint.old"), Path(name), here.with_name(here.name + ".old")
    for folder in places * 3 if name else ():  # as a save may rename them between two looks
        if folder.is_dir():
            return folder
    source = resolve(name)
    if Path(source).is_dir():  # embedded
        return Path(source)
    from slam.download import from_hub
    folder = from_hub(source, ["*.json", "*.safetensors"])
    if not any(folder.glob("*.safetensors")):  # OPT and MobileLLM were published before that format
        from_hub(source, ["pytorch_model*.bin"])
    return folder


# ---------------------------------------------------------------- write
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
        shutil.copymode(new / "config.json", new / "model.safetensors")  # safetensors makes it private
        for path in (*new.iterdir(), new):  # on the disk before the old folder goes, should the power fail
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
    except (OSError, SafetensorError, RuntimeError) as e:  # safetensors and torch.save wrap an OSError in their own
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"{folder}: could not be written ({e})") from e
    recover(folder)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Bring the old folder back after a kill between the two renames of `write_folder`."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def merge_results(path: Path, results: dict) -> None:
    """Merge {metric: {...}} into a results.json; other metrics stay."""
    old = json.loads(path.read_text()) if path.exists() else {}
    write_atomic(path, json.dumps(old | results, indent=2) + "\n")


def git_commit() -> str | None:
    """Commit of the code, `+` if the working tree differs from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------- identify and find
def weights_sha256(name: str) -> str:
    """sha256 of the weights of a model by name."""
    files = sorted(p for p in fetch(name).iterdir() if p.suffix in (".safetensors", ".bin"))
    return hashlib.sha256(b"".join(bytes.fromhex(file_digest(path)) for path in files)).hexdigest()


def checkpoint_fingerprint(name: str) -> Fingerprint:
    """Fingerprint of the units that a checkpoint was trained on. SystemExit if it is not a unit LM's.

    SlamKit's checkpoints do not record their tokeniser: it is taken to be the published one.
    """
    folder = fetch(name)
    if (folder / "slam.json").is_file():
        return Fingerprint(**json.loads((folder / "slam.json").read_text())["fingerprint"])
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if config.get("model_type") == SLAMKIT and config["vocab_size"] < 65_536:  # more: it has a text LM's tokens, too
        return published_fingerprint(config["vocab_size"])
    raise SystemExit(f"{folder / 'slam.json'}: missing, and {name} is not a speech-only checkpoint of SlamKit")


def run_folder(name: str) -> Path:
    """The run folder of a run or of its checkpoint; for a hub id or embedded:NAME, a folder under out/."""
    folder = Path(name)
    folder = folder.parent if folder.name == "checkpoint" else folder
    return folder if folder.is_dir() else Path("out", name.replace("/", "--").replace(":", "--"))


def newest_checkpoint(root: str = "out", stage: str = "", otherwise: str = "") -> str:
    """The run folder below `root` with the newest finished checkpoint (of `stage`, if given).

    If there is none, `otherwise`; SystemExit if that is empty.
    """
    for path in newest_first(root, "slam.json"):
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed: that run is saving
            slam = json.loads(path.read_text())
            if path.parent.name == "checkpoint" and slam.get("finished") and stage in ("", slam.get("stage")):
                return str(path.parent.parent)
    if otherwise:
        print(f"no trained model under {root}/: {otherwise} speaks", file=sys.stderr)
        return otherwise
    raise SystemExit(f"no finished {stage + ' ' if stage else ''}checkpoint under {root}/; train one (bash "
                     f"runs/demo.sh) or name one, for example --checkpoint embedded:slam-mini")


def newest_pairs(checkpoint: str) -> str:
    """The newest pairs_train.jsonl below out/ of the checkpoint's units; SystemExit if there is none.

    Pairs of a model's own continuations (a candidates.jsonl lies beside them) are used only if named.
    """
    fingerprint = checkpoint_fingerprint(checkpoint)
    for path in newest_first("out", "pairs_train.jsonl"):
        with contextlib.suppress(SystemExit):  # a damaged file of another model
            if not path.with_name("candidates.jsonl").exists() and same_units(read_pairs(path)[0], fingerprint):
                return str(path)
    raise SystemExit(f"no pairs_train.jsonl under out/ has the units of {checkpoint}; make one (synth_stories.py "
                     f"config/spoken_swag.py) or name one with --pairs")
