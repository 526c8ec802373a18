"""SlamKit's unit files (features.jsonl, tokens.jsonl, preference features): whose units they hold, and reading them."""
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from slam.tokenizer import codebook_fingerprints, read_codebook
from slam.units import Fingerprint, dedup, published_fingerprint, vocab_size


def slamkit_tokenizer(path: str, tokenizer: str) -> Fingerprint:
    """Fingerprint of the units in a SlamKit file, which names no tokeniser: that of the codebook file `tokenizer`.

    If that is empty, it is SlamKit's default, the published mHuBERT, and a line on stderr says so.
    """
    if tokenizer:
        fingerprint, base = codebook_fingerprints(*read_codebook(tokenizer))
        if fingerprint != base:
            raise SystemExit(f"{path} has units, and {tokenizer} makes pieces of several; name the codebook that it "
                             f"was made from, then `prepare_units.py bpe`")
        return base
    published = published_fingerprint(vocab_size(500))
    print(f"{path} does not name its tokeniser; its units are taken to be of {published}. If that is wrong, name the "
          f"right codebook with --tokenizer", file=sys.stderr)
    return published


def slamkit_units(record: dict, n_units: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Units (T,) of a recording, a line of the file, and, if recorded, durations (T,) in frames; runs are merged.

    slamkit_units({"units": [1, 1, 2], "duration": [2, 3, 1]}, 500) -> [1, 2], [5, 1]
    slamkit_units({"audio_repr": "<Un3><Un49>"}, 500) -> [3, 49], None
    ValueError, KeyError or TypeError if these are not units below `n_units`.
    """
    found = record.get("audio_repr", record)
    if isinstance(found, str):
        if re.sub(r"<Un\d+>", "", found):
            raise ValueError(f"{found[:40]!r} is not <Un3><Un49>…")
        found = {"units": [int(u) for u in re.findall(r"<Un(\d+)>", found)]}
    units, durations = np.array(found["units"]), found.get("duration")
    if units.ndim != 1 or units.dtype.kind != "i" or not len(units) or units.min() < 0 or units.max() >= n_units:
        raise ValueError(f"expected a list of units below {n_units}")
    merged, runs = dedup(units)
    if durations is not None:
        durations = np.array(durations, dtype=np.int64)
        if durations.shape != units.shape or durations.min() < 1:
            raise ValueError(f"{durations.shape} durations for {units.shape} units, each at least 1")
        durations = np.add.reduceat(durations, np.cumsum(runs) - runs)
    return merged, durations


def export(load: Callable[[str], torch.nn.Module]) -> None:
    """`python model.py export`: write a checkpoint in SlamKit's layout, a nested config.json and weights named `lm.*`.

    load: `UnitLM.from_pretrained`. slam.json is copied. SystemExit if the output folder exists.
    """
    import argparse

    from slam.checkpoint import SLAMKIT, fetch, write_folder
    parser = argparse.ArgumentParser(description="python model.py export out/slam slam_for_slamkit")
    parser.add_argument("command", choices=["export"], help="write a checkpoint in SlamKit's layout")
    parser.add_argument("checkpoint", help="run folder, checkpoint folder or hub id")
    parser.add_argument("out", help="folder to write; must not exist")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise SystemExit(f"{args.out} exists; choose another folder")
    lm, slam = load(args.checkpoint), fetch(args.checkpoint) / "slam.json"
    if getattr(lm.config, "first_text_token", 0):
        raise SystemExit(f"{args.checkpoint}: a model of speech and text, whose tokens SlamKit numbers differently")
    base = lm.hf_config()
    # The hub model whose config SlamKit loads first and then overrides with `base_config`: any of the type will do.
    base_names = {"qwen2": "Qwen/Qwen2.5-0.5B", "llama": "HuggingFaceTB/SmolLM2-135M", "opt": "facebook/opt-125m",
                  "gpt_neox": "EleutherAI/pythia-160m"}
    config = {"model_type": SLAMKIT, "architectures": ["UnitLM"], "base_config": base, "twist_init": True,
              "base_model_name": base_names[base["model_type"]], "vocab_size": base["vocab_size"],
              "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "torch_dtype": "float32",
              "tie_word_embeddings": base["tie_word_embeddings"]}
    write_folder(args.out, config, {f"lm.{k}": v for k, v in lm.state_dict().items()},
                 json.loads(slam.read_text()) if slam.is_file() else None)
    print(f"{args.out}: a checkpoint for SlamKit")
