"""Average the weights of a run and of the run that it started from (WiSE-FT, arXiv 2109.01903) into a run folder.

    python dev/average.py BEFORE AFTER OUT --share=0.5    # of AFTER

Files of vocoders that were trained from the same one are averaged, too; OUT is a file then.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from slam.checkpoint import fetch, read_folder, write_folder
from slam.units import require_same
from slam.vocoder import Vocos


def mean(old: dict, new: dict, share: float) -> dict:
    return {name: ((1 - share) * old[name].double() + share * new[name].double()).float() for name in new}


def average(before: str, after: str, out: str, share: float) -> None:
    """Write OUT/checkpoint: (1 - share) BEFORE + share AFTER. SystemExit if the two have not the same shape."""
    (config, old), (config_after, new) = read_folder(before), read_folder(after)
    if config != config_after:
        raise SystemExit(f"{before} and {after}: their config.json differ")
    slam = json.loads((fetch(after) / "slam.json").read_text())
    write_folder(Path(out, "checkpoint"), config, mean(old, new, share),
                 slam | {"average": {before: 1 - share, after: share}})


def average_vocoders(before: str, after: str, out: str, share: float) -> None:
    """Write OUT, a file: (1 - share) BEFORE + share AFTER. SystemExit if they differ in units or shape."""
    old, new = (Vocos.read(Path(file)) for file in (before, after))
    require_same(old.fingerprint, before, new.fingerprint, after)
    if (old.width, old.blocks) != (new.width, new.blocks):
        raise SystemExit(f"{before} and {after}: their shapes differ")
    new.load_state_dict(mean(old.state_dict(), new.state_dict(), share))
    new.save(Path(out), average={before: 1 - share, after: share})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("before", "after", "out"):
        parser.add_argument(name)
    parser.add_argument("--share", type=float, default=0.5, help="of AFTER's weights")
    args = parser.parse_args()
    (average_vocoders if args.before.endswith(".safetensors") else average)(**vars(args))
