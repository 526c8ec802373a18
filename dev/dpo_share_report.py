"""What each share of the budget reached: a table of all metrics and, with matplotlib, curves over the minutes of DPO.

    python dev/dpo_share_report.py out/dpo_share/demo 0 0.25 0.5 1 2
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import table  # noqa: E402


def main(folder: Path, minutes: list[str]) -> None:
    rows = {f"{m} min": json.loads((folder / ("lm_0" if m == "0" else f"dpo_{m}") / "results.json").read_text())
            for m in minutes}
    print(table(rows))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("for the curves: pip install matplotlib")
        return
    aside = ("gram_loss", "_unigram", "_bigram", "_text_lm", "before_training", "val_ppl", "per_second")
    known = [k for k in next(iter(rows.values())) if all(k in r for r in rows.values()) and not k.endswith(aside)]
    figure = Figure(figsize=(4 * len(known), 3.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(known), squeeze=False)[0], known):
        found = [r[metric] for r in rows.values()]
        axes.errorbar(list(map(float, minutes)), [x["value"] for x in found], [x.get("se") or 0 for x in found],
                      marker="o", ms=4, color="black", lw=1, capsize=3)
        axes.set(title=metric, xlabel="minutes of DPO")
        axes.grid(alpha=0.3)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"curve.{kind}", dpi=120)
    print(f"{folder}/curve.png")


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
