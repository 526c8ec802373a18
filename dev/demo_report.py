"""The demo's closing table, from its results.json files: python dev/demo_report.py TOTAL_SECONDS

A figure of a trained model is a result if it is better than its floor by two standard errors. Floors: chance and a
bigram model of the units for pairs, the bigram model for the validation loss, the model before DPO for GenPPL (which is
low for noise, so an untrained model is no floor).
"""
import json
import math
import sys
from pathlib import Path

ROWS = {"val_loss": "validation loss (nats per unit)", "tstorycloze": "tStoryCloze-style accuracy (%)",
        "sblimp": "sBLIMP-style accuracy (%)", "gen_ppl": "GenPPL (prompt and continuation)"}


def text(result: dict) -> str:
    se = result.get("se")
    return f"{result['value']:.2f}" + (f" ± {se:.1f}" if se is not None else "")


def is_result(metric: str, result: dict, floor: dict) -> bool:
    """Whether a result is better than its floor by two standard errors of the difference."""
    se = 2 * math.hypot(result.get("se") or 0, floor.get("se") or 0)
    if metric in ("tstorycloze", "sblimp"):
        return result["value"] > max(floor["value"] + se, 50 + 2 * result["se"])
    return result["value"] < floor["value"] - se


def main(out: Path, seconds: int) -> None:
    runs = {"trained": out / "lm", "after DPO": out / "dpo", "slam-mini": out.parent / "embedded--slam-mini"}
    results = [json.loads((run / "results.json").read_text()) for run in runs.values()]
    print("\nminutes")
    for line in (out / "seconds.tsv").read_text().splitlines():
        name, n = line.split("\t")
        print(f"  {name:28}{int(n) / 60:6.1f}")
    print(f"  {'in all':28}{seconds / 60:6.1f}")

    print(f"\n{'':36}" + "".join(f"{name:>16}" for name in ("floor", *runs)))
    for metric, label in ROWS.items():
        floor = results[0][{"val_loss": "bigram_loss", "gen_ppl": "gen_ppl"}.get(metric, f"{metric}_bigram")]
        cells = [text(r[metric]) if is_result(metric, r[metric], floor) else "-" for r in results]
        print(f"{label:36}" + "".join(f"{cell:>16}" for cell in (text(floor), *cells)))
    print("-: not better by two standard errors than the floor (a bigram model; of pairs also chance, 50 %; of GenPPL "
          "the\nmodel before DPO). The model was trained on 1 h of stories, three times over, slam-mini, which"
          "\ncomes with the code, on 290 h.")

    print("\na prompt continued aloud (open out/demo/samples/listen.html to compare by ear)")
    for sample in json.loads((out / "samples" / "samples.json").read_text())["samples"]:
        print(f"  {sample['whole']}\n    {sample['prompt_text']} | {sample.get('continuation_text', '')}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        raise SystemExit(__doc__)
    main(Path("out/demo"), int(sys.argv[1]))
