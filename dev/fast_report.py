"""Tokens that slam_fast.py's settings need for slam.py's validation loss, from the runs of fast_study.sh."""
import json
import statistics
from pathlib import Path

import numpy as np

out = Path("out/study")


def final(folder: Path) -> tuple[int, float]:
    """Tokens seen and validation loss at the end of a run."""
    tokens = json.loads((folder / "checkpoint" / "slam.json").read_text())["tokens"]
    return tokens, json.loads((folder / "results.json").read_text())["val_loss"]["value"]


ratios = []
for slam in sorted(out.glob("slam_[0-9]")):
    seed = slam.name[-1]
    tokens, loss = final(slam)
    runs = sorted(final(p) for p in out.glob(f"fast_*_{seed}"))
    print(f"seed {seed}: slam {tokens:,} tokens -> {loss:.4f}; fast " +
          ", ".join(f"{n:,} -> {x:.4f}" for n, x in runs))
    losses = [x for _, x in runs]
    if losses != sorted(losses, reverse=True) or not losses[-1] <= loss <= losses[0]:
        raise SystemExit("the fast runs' losses do not fall, or slam's is not between them: choose other lengths in "
                         "fast_study.sh")
    # each run has a whole schedule of its own, so that between two of them the loss is a function of the length
    needed = np.exp(np.interp(-loss, [-x for x in losses], [np.log(n) for n, _ in runs]))
    ratios.append(needed / tokens)
print(f"fast needs {', '.join(f'{r:.2f}' for r in ratios)} of slam's tokens: {statistics.mean(ratios):.2f} ± "
      f"{statistics.stdev(ratios) / len(ratios) ** 0.5:.3f} (standard error over {len(ratios)} seeds)")
