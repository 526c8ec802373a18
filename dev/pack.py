"""Pack a unit LM into one small file for assets/, from which slam/build_embedded.py makes a checkpoint folder.

    python dev/pack.py out/slam assets/slam_mini.safetensors
"""
import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save

from slam.checkpoint import checkpoint_fingerprint, read_folder
from slam.units import write_atomic


def pack(checkpoint: str, file: str) -> None:
    """Write a unit LM's weights, config.json and slam.json to one file: int8, each row divided by its own scale.

    The largest weight of a row is 127, so that no weight is off by more than 0.4 % of it. Vectors stay float32.
    """
    config, weights = read_folder(checkpoint)
    tensors = {}
    for name, weight in weights.items():
        tensors[name] = weight = weight.float()
        if weight.ndim == 2:
            tensors[f"{name}.scale"] = scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
    slam = {"stage": "packed", "finished": True, "fingerprint": asdict(checkpoint_fingerprint(checkpoint))}
    write_atomic(Path(file), save(tensors, {"config": json.dumps(config), "slam": json.dumps(slam)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the unit LM: a run folder, a checkpoint folder or a hub id")
    parser.add_argument("file", help="the .safetensors file to write")
    pack(**vars(parser.parse_args()))
