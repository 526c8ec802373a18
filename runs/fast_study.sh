#!/usr/bin/env bash
# How many tokens slam_fast.py's settings need to reach the validation loss that slam.py's reach, at a small scale
# (config/study.py), three seeds each: half an hour on two CPU cores, data included. If killed, start it again.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
grep -qs '"done": true' out/study/data/synth.json || python synth_stories.py config/demo_stories.py --out=out/study/data \
    --n_train=640 --n_val=60 --n_pairs=4 --n_sblimp=4 --keep_audio
for seed in 0 1 2; do
    python train.py config/slam.py config/study.py --out=out/study/slam_$seed --seed=$seed --resume
    for tokens in 120000 180000 260000; do
        python train.py config/slam_fast.py config/study.py --out=out/study/fast_${tokens}_$seed --seed=$seed \
            --tokens=$tokens --resume
    done
done
python dev/fast_report.py
