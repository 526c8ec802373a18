"""Average the weights of a run and of the run that it went on from (WiSE-FT, arXiv 2109.01903): a run folder.

    python dev/average.py BEFORE AFTER OUT --share=0.5    # of AFTER
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from slam.checkpoint import fetch, read_folder, write_folder


def average(before: str, after: str, out: str, share: float) -> None:
    """Write OUT/checkpoint: (1 - share) BEFORE + share AFTER. SystemExit if the two have not the same shape."""
    (config, old), (config_after, new) = read_folder(before), read_folder(after)
    if config != config_after:
        raise SystemExit(f"{before} and {after}: their config.json differ")
    weights = {name: ((1 - share) * old[name].double() + share * new[name].double()).float() for name in new}
    slam = json.loads((fetch(after) / "slam.json").read_text())
    write_folder(Path(out, "checkpoint"), config, weights, slam | {"average": {before: 1 - share, after: share}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("before", "after", "out"):
        parser.add_argument(name)
    parser.add_argument("--share", type=float, default=0.5, help="of AFTER's weights")
    average(**vars(parser.parse_args()))
