"""What runs/dpo_study.sh found: means over seeds and their standard errors, as a Markdown table.

    python runs/dpo_study_report.py out/study/dpo
"""
import json
import sys
from pathlib import Path

import numpy as np

ROWS = [("before DPO", "lm", ""), ("a story's own sentence over another's, 60 steps", "stories", ""),
        ("own continuations, 15 steps", "own_dpo", ""), ("own continuations, 60 steps", "own_long", ""),
        ("before DPO, no repetition penalty", "lm", "_free"),
        ("own continuations, 60 steps, no penalty", "own_long", "_free")]
COLUMNS = [("pair accuracy, held out, %", "val_reward_accuracy", "value", 100), ("val. loss", "val_loss", "value", 1),
           ("tSC, %", "tstorycloze", "value", 1), ("sBLIMP, %", "sblimp", "value", 1),
           ("GenPPL", "gen_ppl", "value", 1), ("GenPPL, continuation", "gen_ppl", "continuation_only", 1),
           ("auto-BLEU", "auto_bleu", "value", 1)]


def main(folder: Path) -> None:
    print(f"| | {' | '.join(name for name, *_ in COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for label, run, suffix in ROWS:
        found = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{run}_[0-9]/results.json"))]
        cells = []
        for _, metric, key, scale in COLUMNS:
            free = metric in ("gen_ppl", "auto_bleu")
            values = [scale * r[metric + suffix * free][key] for r in found
                      if (free or not suffix) and metric + suffix * free in r]
            se = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{se}" if values else "")
        print(f"| {label} ({len(found)}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
