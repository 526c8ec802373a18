"""Pictures of runs: the paper's figure 1 (tStoryCloze against training compute) and loss against compute.

    python dev/plot.py --run out/slam --run out/slam_dpo      # out/plots/tstorycloze.png, .svg, loss.png, .svg

Larger circles are larger models. Published rows are drawn where parameters and tokens are known; a run's compute is
6 N D (Kaplan et al. 2020), including that of the run it started from. No colours are needed. Needs matplotlib.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from config import load_config

# name, parameters, tokens (None: one A5000 day, 3.0e18 FLOPs), tStoryCloze; the paper's tables 1 to 3
PUBLISHED = [("GSLM", 100e6, 1e9, 66.6), ("TWIST-7B", 7e9, 36e9, 74.1),
             ("TWIST-350M, one day", 305e6, None, 68.80), ("TWIST-350M, one day, + sTinyStories", 305e6, None, 72.40),
             ("Cuervo & Marxer, one day", 78e6, None, 70.49), ("Slam -DPO", 358e6, 1.4e9, 78.01),
             ("Slam", 358e6, 1.4e9, 82.04), ("Slam (scaled) -DPO", 358e6, 16.7e9, 80.71),
             ("Slam (scaled)", 358e6, 16.7e9, 84.18), ("Slam (large)", 1.3e9, 6.1e9, 85.30)]


DAY = 3.0e18


@dataclass
class PlotConfig:
    """Draw results and losses of runs over their compute."""
    run: tuple[str, ...] = ()  # run folders; none: every one under out/ with a results.json
    metric: str = "tstorycloze"  # of results.json; the published rows are drawn with tstorycloze
    out: str = "out/plots"  # folder for the pictures


def read_run(folder: Path) -> dict | None:
    """Name, parameters, FLOPs, results and losses [(FLOPs, loss)] of a run folder; None if it is no run folder."""
    slam = folder / "checkpoint" / "slam.json"
    if not slam.is_file() or not (folder / "results.json").is_file():
        return None
    slam = json.loads(slam.read_text())
    weights = folder / "checkpoint" / "model.safetensors"
    with open(weights, "rb") as f:  # the header of a safetensors file: names and shapes
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    n_params = sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    before = read_run(Path(str(slam["config"]["checkpoint"]).removesuffix("/checkpoint"))) \
        if slam["stage"] == "dpo" else None
    spent = before["flops"] if before else 0.0
    if slam["stage"] == "dpo" and not before:
        print(f"{folder}: {slam['config']['checkpoint']}, which it started from, is no run folder here; its compute is "
              f"not counted")
    losses = []
    for line in (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").is_file() else ():
        with contextlib.suppress(ValueError):  # a kill may have cut the last
            r = json.loads(line)
            losses += [(spent + 6 * n_params * r["tokens"], r["val_loss"])] if "val_loss" in r and r["tokens"] else []
    return {"name": str(folder), "n_params": n_params, "flops": spent + 6 * n_params * slam["tokens"],
            "results": json.loads((folder / "results.json").read_text()), "losses": losses}


def plot(cfg: PlotConfig) -> None:
    """Write the pictures. SystemExit if there is nothing to draw, or nothing to draw with."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patheffects import withStroke
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install matplotlib") from None
    folders = list(map(Path, cfg.run)) or [p.parent for p in sorted(Path("out").rglob("results.json"))]
    runs = [run for folder in folders if (run := read_run(folder))]
    if cfg.run and len(runs) < len(folders):
        missing = sorted({str(folder) for folder in folders} - {run["name"] for run in runs})
        raise SystemExit(f"{', '.join(missing)}: no run folder with checkpoint and results.json")
    scored = [r for r in runs if r["flops"] and r["results"].get(cfg.metric, {}).get("value") is not None]
    # A set of one's own may have the benchmark's name; its results are not to be compared with published ones.
    own = any(not r["results"][cfg.metric].get("settings", {}).get("downloaded", True) for r in scored)
    published = PUBLISHED if cfg.metric == "tstorycloze" and not own else []
    if not scored and not published:
        raise SystemExit(f"no run has {cfg.metric} in its results.json; eval.py puts it there")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)

    def save(figure: Figure, name: str) -> None:
        for kind in ("png", "svg"):
            figure.savefig(Path(cfg.out) / f"{name}.{kind}", dpi=150)
        print(f"{cfg.out}/{name}.png")

    def size(n_params: float) -> float:
        return 12 * math.sqrt(n_params / 1e6)

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="training compute, 6 N D (FLOPs)", ylabel=f"{cfg.metric} (%)")
    points = [(name, n, 6 * n * tokens if tokens else DAY, y, False) for name, n, tokens, y in published]
    points += [(r["name"], r["n_params"], r["flops"], r["results"][cfg.metric]["value"], True) for r in scored]
    taken = []  # places of labels: to the right of their circles, lower where they would stand on another
    for name, n, x, y, own in sorted(points, key=lambda p: -p[3]):
        axes.scatter(x, y, s=size(n), color="black" if own else "0.75", edgecolor="black", zorder=2 + own)
        at = y
        while any(abs(at - other) < 0.9 and abs(math.log10(x / there)) < 1.2 for there, other in taken):
            at -= 0.1
        taken.append((x, at))
        axes.annotate(name, (x, at), (math.sqrt(size(n)) / 2 + 4, 0), textcoords="offset points", fontsize=8,
                      va="center", weight="bold" if own else "normal", zorder=5,
                      path_effects=[withStroke(linewidth=2.5, foreground="white")])
    for r in scored:
        if se := r["results"][cfg.metric].get("se"):
            axes.errorbar(r["flops"], r["results"][cfg.metric]["value"], se, color="black", capsize=3, lw=1, zorder=1)
    low, high = min(p[2] for p in points), max(p[2] for p in points)
    axes.set_xlim(low / 3, high * (high / low) ** 0.25 * 3)
    axes.axhline(50, color="0.6", lw=0.8, ls=":")
    axes.grid(alpha=0.25)
    axes.set_title("black: your runs, grey: published; larger circles: more parameters" if published else cfg.metric)
    save(figure, cfg.metric)

    curves = [r for r in runs if len(r["losses"]) > 1]
    if curves:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="training compute, 6 N D (FLOPs)",
                                  ylabel="validation loss (nats per token)")
        for i, r in enumerate(curves):
            axes.plot(*zip(*r["losses"]), color=str(0.6 * (i % 4) / 3), ls=["-", "--", "-.", ":"][i // 4 % 4],
                      marker="os^Dvx"[i % 6], ms=4, lw=1, label=r["name"])
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
        save(figure, "loss")


if __name__ == "__main__":
    plot(load_config(PlotConfig, sys.argv[1:], __doc__))
