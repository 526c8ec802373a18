"""The demo's closing table, from its results.json files: python dev/demo_report.py TOTAL_SECONDS"""
import json
import sys
from pathlib import Path

out = Path("out/demo")
before, lm, dpo = (json.loads((out / run / "results.json").read_text()) for run in ("untrained", "lm", "dpo"))


def cell(results: dict, metric: str, key: str = "value") -> str:
    if results.get(metric, {}).get(key) is None:
        return "-"
    se = results[metric].get("se") if key == "value" else None
    return f"{results[metric][key]:.2f}" + (f" ± {se:.1f}" if se is not None else "")


print("\nminutes")
for line in (out / "seconds.tsv").read_text().splitlines():
    name, seconds = line.split("\t")
    print(f"  {name:28}{int(seconds) / 60:6.1f}")
print(f"  {'in all':28}{int(sys.argv[1]) / 60:6.1f}")

print(f"\n{'':38}{'untrained':>14}{'trained':>14}{'after DPO':>14}")
for label, metric, key in (
        ("validation loss (nats per unit)", "val_loss", "value"),
        ("tStoryCloze-style accuracy (%)", "tstorycloze", "value"),
        ("sBLIMP-style accuracy (%)", "sblimp", "value"), ("GenPPL (prompt and continuation)", "gen_ppl", "value"),
        ("GenPPL (continuation alone)", "gen_ppl", "continuation_only"), ("auto-BLEU (x 100)", "auto_bleu", "value")):
    print(f"{label:38}" + "".join(f"{cell(r, metric, key):>14}" for r in (before, lm, dpo)))
print(f"for comparison: a unigram model of the units has a loss of {lm['unigram_loss']['value']:.2f}, a bigram model "
      f"{lm['bigram_loss']['value']:.2f};\nof the pairs a bigram model of the units gets "
      f"{cell(lm, 'tstorycloze_bigram')} and {cell(lm, 'sblimp_bigram')} right, SmolLM2 on the transcripts "
      f"{cell(lm, 'tstorycloze_text_lm')} and {cell(lm, 'sblimp_text_lm')}")

print("\na prompt continued aloud (open out/demo/samples/listen.html to compare by ear)")
for sample in json.loads((out / "samples" / "samples.json").read_text())["samples"]:
    print(f"  {sample['whole']}\n    {sample['prompt_text']} | {sample.get('continuation_text', '')}")
