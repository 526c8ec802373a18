"""docs/demo.png: a spoken prompt with its continuation, and the demo's loss curve. After `bash runs/demo.sh`:

    python dev/demo_picture.py
"""
import json
import sys
from pathlib import Path

import soundfile
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from slam.mel import spectrogram


def main(demo: Path) -> None:
    sample = json.loads((demo / "samples" / "samples.json").read_text())["samples"][0]
    wave, rate = soundfile.read(sample["whole"], dtype="float32")
    starts, seconds = sample["continuation_starts"], len(wave) / rate
    records = [json.loads(line) for line in (demo / "lm" / "log.jsonl").read_text().splitlines()]
    bigram = json.loads((demo / "lm" / "results.json").read_text())["bigram_loss"]["value"]

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    left.imshow(spectrogram(wave, rate), origin="upper", aspect="auto", cmap="magma", extent=(0, seconds, 0, 1))
    left.axvline(starts, color="white", lw=2)
    for x, text in ((starts / 2, "prompt"), ((starts + seconds) / 2, "continuation")):
        left.text(x, 0.9, text, color="white", ha="center", weight="bold")
    left.set(xlabel="seconds", yticks=[], ylabel="mel frequency")
    for key, label, style in (("loss", "training", {"lw": 1}),
                              ("val_loss", "validation", {"marker": "o", "ms": 5, "ls": ""})):
        right.plot(*zip(*((r["tokens"] / 1e3, r[key]) for r in records if key in r)), label=label, **style)
    right.axhline(bigram, color="0.5", ls=":", label="bigram model")
    right.set(xlabel="thousand tokens", ylabel="nats per unit", ylim=(1, 4))
    right.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "demo.png", dpi=80)


if __name__ == "__main__":
    if "--help" in sys.argv:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "demo")
