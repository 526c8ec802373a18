"""Slam's results beside the paper's, as Markdown: python dev/slam_report.py SCALE RUN DPO_RUN > out/results.md"""
import json
import sys
from pathlib import Path

# The paper's tables 2 and 3: sBLIMP, sStoryCloze, tStoryCloze, GenPPL, auto-BLEU (x 100), before and after DPO.
METRICS = ("sblimp", "sstorycloze", "tstorycloze", "gen_ppl", "auto_bleu")
PAPER = {"slam": ((56.45, 55.59, 78.01, 88.3, 3.47), (58.86, 58.04, 82.04, 62.8, 3.88)),
         "scaled": ((58.53, 58.15, 80.71, 67.3, 3.25), (61.11, 61.30, 84.18, 46.6, 3.75))}
LABELS = {"sblimp": "sBLIMP, %", "sstorycloze": "sStoryCloze, %", "tstorycloze": "tStoryCloze, %", "gen_ppl": "GenPPL",
          "auto_bleu": "auto-BLEU × 100", "val_loss": "validation loss, nats per unit"}


def cell(results: dict, metric: str) -> str:
    found = results.get(metric, {})
    if found.get("value") is None:
        return "-"
    return f"{found['value']:.2f}" + (f" ± {found['se']:.2f}" if found.get("se") is not None else "")


def main(scale: str, *runs: str) -> None:
    ours = [json.loads((Path(run) / "results.json").read_text()) for run in runs]
    paper = PAPER.get(scale, ((None,) * 5,) * 2)
    print(f"# Slam, {scale}\n\n| | before DPO | the paper's | after DPO | the paper's |\n|---|---|---|---|---|")
    for metric in ("val_loss", *METRICS):
        theirs = [x[METRICS.index(metric)] if metric in METRICS else None for x in paper]
        cells = [x for results, their in zip(ours, theirs) for x in (cell(results, metric), str(their or "-"))]
        print("|", " | ".join([LABELS[metric], *cells]), "|")
    print("\n± is a standard error.", "The paper's validation loss, 1.64 to 1.67, is on other data." if scale in PAPER
          else "These are small sets of generated speech, scored by small models: only to see that every step works.")
    print()
    for run in runs:
        slam = json.loads((Path(run) / "checkpoint" / "slam.json").read_text())
        print(f"- `{run}`: {slam['step']:,} steps, {slam['tokens']:,} tokens, {slam['seconds'] / 3600:.2f} h; code "
              f"{slam['git']}, torch {slam['torch']}")
    settings = ours[-1].get("gen_ppl", {}).get("settings", {})
    print(f"- GenPPL: ASR {settings.get('asr')}, judge {settings.get('judge')}")


if __name__ == "__main__":
    if len(sys.argv) < 4 or "--help" in sys.argv:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
