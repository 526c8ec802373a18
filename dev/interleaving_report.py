"""What runs/interleaving_study.sh found: a table in Markdown and, with matplotlib, a picture.

    python dev/interleaving_report.py out/interleaving docs/interleaving.png

With several seeds, means over them. ± is the standard error over pairs, which all seeds share. Bold: two of these above
chance.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np

ARMS = {"speech": "speech only", "interleaved": "interleaved", "side_by_side": "side by side"}
DIRECTIONS = {"S→S": "tstorycloze", "S→T": "tstorycloze_speech_to_text", "T→S": "tstorycloze_text_to_speech",
              "T→T": "tstorycloze_text_to_text"}


def read(folder: Path, label: str) -> dict[str, tuple[float, float]]:
    """{metric: (value, standard error)} of a run at a budget, and the tokens that it had seen."""
    results = json.loads((folder / f"{label}.json").read_text())
    found = {k: (x["value"], x.get("se") or 0.0) for k, x in results.items()
             if isinstance(x, dict) and x.get("value") is not None}
    log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    name = "val_loss" if label != "0" else "val_loss_before_training"
    tokens = next(r["tokens"] for r in log if "val_loss" in r and r["step"] == results[name]["step"])
    return found | {"tokens": (tokens, 0.0)}


def mean(runs: list[dict], metric: str) -> tuple[float, float]:
    """Means over seeds of the value and of its standard error; nan where there is no value."""
    values = [run[metric] for run in runs if metric in run]
    return tuple(np.mean(values, 0)) if values else (math.nan, math.nan)


def percent(value: float, se: float) -> str:
    cell = f"{value:.1f} ± {se:.1f}"
    return "" if math.isnan(value) else f"**{cell}**" if value - 2 * se > 50 else cell


def number(x: float, form: str) -> str:
    return "" if math.isnan(x) else format(x, form)


def draw(found: dict[tuple[str, float], list[dict]], path: str) -> None:
    """Four panels: pairs in speech, pairs in all directions, validation loss against FLOPs and against tokens."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 7), layout="constrained")
    (speech, four), (flops, tokens) = figure.subplots(2, 2)
    styles = ("black", "-", "o"), ("black", "--", "s"), ("0.5", "-.", "^"), ("0.5", ":", "D")
    look = dict(zip(ARMS, styles)) | dict(zip(DIRECTIONS, styles))

    def line(axes, arm: str, metric: str, name: str, x: str = "", beside: float = 1.0) -> None:
        points = [(mean(runs, x)[0] if x else budget * beside, *mean(runs, metric))
                  for (a, budget), runs in sorted(found.items()) if a == arm]
        if points and not all(math.isnan(y) for _, y, _ in points):
            color, ls, marker = look[name]
            axes.errorbar(*zip(*points), color=color, ls=ls, marker=marker, ms=5, lw=1.2, capsize=3,
                          label=ARMS.get(name, name))

    for arm in ARMS:
        line(speech, arm, DIRECTIONS["S→S"], arm)
        line(flops, arm, "val_loss", arm)
        line(tokens, arm, "val_loss", arm, "tokens")
    for i, (name, metric) in enumerate(DIRECTIONS.items()):
        line(four, "interleaved", metric, name, beside=1.02 ** i)  # so that no error bar hides another
    speech.set(title="pairs, speech to speech", ylabel="tStoryCloze-style accuracy (%)")
    four.set(title="pairs, the interleaved model", ylabel="tStoryCloze-style accuracy (%)")
    flops.set(title="units of held-out stories", ylabel="validation loss (nats per unit)")
    tokens.set(title="the same, against tokens of all kinds", ylabel="validation loss (nats per unit)")
    for axes in (speech, four):
        axes.axhline(50, color="0.6", lw=0.8, ls=":")
        axes.margins(y=0.25)  # room for the legend
    for axes in (speech, four, flops, tokens):
        axes.set(xscale="log", xlabel="tokens" if axes is tokens else "training compute (FLOPs)")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, loc="upper right", ncols=4)
    figure.savefig(path, dpi=120)
    print(f"\n{path}")


def main(out: Path, picture: str) -> None:
    found = {}  # (arm, budget) -> the results of each seed
    for arm in ARMS:
        for file in sorted(out.glob(f"{arm}_[0-9]*/*e[0-9]*.json"), key=lambda file: float(file.stem)):
            found.setdefault((arm, float(file.stem)), []).append(read(file.parent, file.stem))
    if not found:
        raise SystemExit(f"{out}: no results; bash runs/interleaving_study.sh makes them")
    start = [read(out / "start", "0")]

    print(f"| | FLOPs | tokens | validation loss, nats per unit | text perplexity | {' | '.join(DIRECTIONS)} |")
    print(f"|---|{'---|' * (4 + len(DIRECTIONS))}")
    print(f"| the text LM | | | | | | | | {percent(*mean(start, 'tstorycloze_text_lm'))} |")
    rows = {("start", 0.0): start} | found
    for (arm, budget), runs in rows.items():
        after = "_before_training" if arm == "start" else ""
        cells = [ARMS.get(arm, "its first layers, untrained"), f"{budget:.0e}".replace("e+", "e") if budget else "0",
                 f"{mean(runs, 'tokens')[0]:,.0f}", number(mean(runs, f"val_loss{after}")[0], ".3f"),
                 number(math.exp(mean(runs, f"val_loss_text{after}")[0]), ".3g"),
                 *(percent(*mean(runs, metric)) for metric in DIRECTIONS.values())]
        print(f"| {' | '.join(cells)} |")
    print()
    for (arm, budget), runs in found.items():
        if arm != "speech" and ("speech", budget) in found:
            (a, se_a), (b, se_b) = (mean(x, DIRECTIONS["S→S"]) for x in (runs, found["speech", budget]))
            loss = mean(runs, "val_loss")[0] - mean(found["speech", budget], "val_loss")[0]
            print(f"{ARMS[arm]} against speech only at {budget:.0e} FLOPs: validation loss {loss:+.3f}, S→S "
                  f"{a - b:+.1f} ± {math.hypot(se_a, se_b):.1f} points (errors added as if of different pairs)")
    try:
        draw(found, picture)
    except ImportError:
        print("for the picture: pip install matplotlib")


if __name__ == "__main__":
    if len(sys.argv) < 3 or "--help" in sys.argv:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2])
