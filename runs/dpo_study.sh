#!/usr/bin/env bash
# What DPO on a small model's own continuations (AlignSLM) does, three seeds: 15 steps and 60. About an hour
# on two CPU cores, a third of it for the data. If killed, start it again to continue.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
data=out/study/data out=out/study/dpo
grep -qs '"done": true' $data/synth.json || python synth_stories.py config/demo_stories.py --out=$data \
    --n_train=640 --n_val=60 --n_pairs=4 --n_sblimp=4 --keep_audio

score() {  # score RUN SEED [FLAGS]
    grep -qs '"gen_ppl"' "$1/results.json" || python eval.py --checkpoint="$1" --val=$data/units/val \
        --train=$data/units/train --generate_from=$data/tstorycloze --n_generate=50 --allow_eos=false --seed="${@:2}"
}

tune() {  # tune NAME STEPS SEED
    python dpo.py --checkpoint=$out/lm_0 --pairs=$out/own_0/pairs_train.jsonl --val_pairs=$out/own_0/pairs_val.jsonl \
        --out=$out/$1_$3 --batch_pairs=16 --steps=$2 --warmup=0.1 --lr=2e-4 --eval_every=1000 --n_samples=0 --seed=$3 \
        --resume
    score $out/$1_$3 $3
}

python train.py config/slam_fast.py config/study.py --tokens=6e5 --out=$out/lm_0 --resume
python dpo.py pairs --checkpoint=$out/lm_0 --prompts=$data/units/train --n_prompts=160 --n=4 --n_val=20 \
    --new_units=100 --allow_eos=false --temperature=0.9 --min_gap=0.3 --out=$out/own_0
score $out/lm_0 0 --n_seeds=3
for seed in 0 1 2; do
    tune own_dpo 15 $seed
    tune own_long 60 $seed
done
python dev/dpo_study_report.py $out
