#!/usr/bin/env bash
# The whole of Slam in miniature, on real parts, with no GPU and no hub: 5 to 8 minutes on two cores, after set-up.
# If it is killed or fails, start it again to continue. Everything is written to out/demo.
set -euo pipefail
if [ $# -gt 0 ]; then sed -n '2,3s/^# //p' "$0"; exit 2; fi  # it has no settings
started=$SECONDS
source "$(dirname "$0")/setup.sh"
out=out/demo
mkdir -p "$out"

stage() {  # stage NAME COMMAND...: run it and note its minutes
    local name=$1 began=$SECONDS; shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    printf '%s\t%s\n' "$name" "$((SECONDS - began))" >> "$out/seconds.tsv"
}

: > "$out/seconds.tsv"
printf 'set-up\t%s\n' "$((SECONDS - started))" >> "$out/seconds.tsv"
stage "embedded models" python -m slam.embedded
stage "stories, speech, units" python synth_stories.py config/demo_stories.py
stage "training" python train.py config/demo_train.py --resume
stage "DPO" python dpo.py config/demo_dpo.py --resume
stage "evaluation" python eval.py config/demo_eval.py
stage "evaluation, slam-mini" python eval.py config/demo_eval.py --checkpoint embedded:slam-mini
prompt=$(python -c "import json; print(json.loads(open('$out/data/tstorycloze/manifest.jsonl').readline())['positive'])")
stage "a prompt continued" python sample.py --prompt "$out/data/tstorycloze/$prompt" --checkpoint $out/lm \
    --checkpoint $out/dpo --checkpoint embedded:slam-mini --out $out/samples --from_start --prompt_seconds 6 --n 2 --overwrite
python dev/demo_report.py "$((SECONDS - started))"
