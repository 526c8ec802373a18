"""What runs/dpo_study.sh found: means over seeds and their standard errors, as a Markdown table.

    python dev/dpo_study_report.py out/study/dpo
"""
import json
import sys
from pathlib import Path

import numpy as np

ROWS = [("before DPO", "lm"), ("own continuations, 15 steps", "own_dpo"), ("own continuations, 60 steps", "own_long")]
COLUMNS = [("chosen likelier, held out, %", "val_chosen_preferred", "value", 100),
           ("margin positive, %", "val_reward_accuracy", "value", 100), ("val. loss", "val_loss", "value", 1),
           ("GenPPL", "gen_ppl", "value", 1), ("GenPPL, continuation", "gen_ppl", "continuation_only", 1),
           ("auto-BLEU", "auto_bleu", "value", 1)]


def main(folder: Path) -> None:
    print(f"| | {' | '.join(name for name, *_ in COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for label, run in ROWS:
        found = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{run}_[0-9]/results.json"))]
        if run == "lm":  # the first evaluation of DPO on it
            begun = map(json.loads, (folder / "own_dpo_0" / "log.jsonl").read_text().splitlines())
            found[0] |= {k: {"value": v} for k, v in next(begun).items() if k.startswith("val_")}
        cells = []
        for _, metric, key, scale in COLUMNS:
            values = []  # of every seed of DPO; of every seed of sampling, where there is no DPO
            for r in found:
                if result := r.get(metric):
                    seeds = result.get({"value": "seeds", "continuation_only": "continuation_seeds"}[key])
                    values += [scale * x for x in seeds or [result[key]]]
            se = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{se}" if values else "")
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
