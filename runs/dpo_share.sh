#!/usr/bin/env bash
# How much of a day DPO should get (the paper's figure 5): a share of a fixed budget goes to DPO and the rest to
# pre-training, each with its own whole schedule. Ends with a table, curve.png and curve.svg in out/dpo_share/SCALE.
#
#   bash runs/dpo_share.sh slam --benchmark=tstorycloze --path=tSC   # 24 h a share; what follows are flags for eval.py
#   bash runs/dpo_share.sh demo                                  # 4 minutes a share, after runs/demo.sh
#   HOURS=12 MINUTES="0 15 30" bash runs/dpo_share.sh slam       # another budget, other shares of it; in slam_12h
#
# If killed, start it again to continue. The data, out/spoken_swag or out/demo/data, must exist.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
scale=${1:-}; shift || true
case $scale in
slam) hours=24 minutes="0 10 30 60 120" train=config/slam.py dpo=config/slam_dpo.py evaluate="--val=out/units/librispeech_dev" ;;
demo) hours=0.0667 minutes="0 0.25 0.5 1 2" train=config/demo_train.py dpo=config/demo_dpo.py evaluate=config/demo_eval.py ;;
*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
hours=${HOURS:-$hours} minutes=${MINUTES:-$minutes} out=out/dpo_share/$scale${HOURS:+_${HOURS}h}
for share in $minutes; do
    dpo_hours=$(python -c "print($share / 60)")
    lm_hours=$(python -c "print($hours - $share / 60)")
    python train.py $train --out="$out/lm_$share" --tokens=none --steps=none --time_budget_hours=$lm_hours --resume
    run=$out/lm_$share
    if [ "$share" != 0 ]; then
        run=$out/dpo_$share
        python dpo.py $dpo --out="$run" --checkpoint="$out/lm_$share" --steps=none --time_budget_hours=$dpo_hours --resume
    fi
    python eval.py $evaluate --checkpoint="$run" "$@"
done
python dev/dpo_share_report.py "$out" $minutes
