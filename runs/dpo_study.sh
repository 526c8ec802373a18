#!/usr/bin/env bash
# What DPO does at a small scale, three seeds: on a story's own next sentence against another story's, and on the model's
# own continuations (AlignSLM); too little and too much of it; with and without a repetition penalty.
# An hour and a half on two CPU cores, half of it for the data. Killed, it goes on.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
out=out/study/dpo
[ -e out/study/data/pairs_val.jsonl ] || python synth_stories.py config/demo_stories.py --out=out/study/data \
    --n_train=640 --n_val=60 --n_pairs=4 --n_sblimp=4 --keep_audio
python synth_stories.py config/corpus_stories.py
[ -e out/corpus_units ] || python prepare_units.py config/corpus_units.py
python synth_stories.py config/study_stories.py  # of other stories than those that the models are trained on

score() {  # score RUN FLAG...
    python eval.py config/demo_eval.py --checkpoint="$1" --train= --val=out/study/data/units/val \
        --pairs=out/study/stories/tstorycloze,out/study/stories/sblimp --generate_from=out/study/stories/tstorycloze \
        --n_generate=100 "${@:2}"
}

tune() {  # tune PAIRS NAME STEPS: DPO of this seed's model
    python dpo.py --checkpoint=$out/lm_$seed --pairs=$1/pairs_train.jsonl --val_pairs=$1/pairs_val.jsonl \
        --out=$out/$2_$seed --batch_pairs=16 --steps=$3 --warmup=0.1 --lr=2e-4 --eval_every=1000 --n_samples=0 \
        --seed=$seed --resume
}

for seed in 0 1 2; do
    python train.py config/slam_fast.py config/study.py --train=out/study/data/units/train,out/corpus_units \
        --tokens=1.2e6 --out=$out/lm_$seed --seed=$seed --resume
    python dpo.py pairs --checkpoint=$out/lm_$seed --prompts=out/study/stories/pairs_train.jsonl --n_prompts=300 --n=4 \
        --n_val=40 --new_units=100 --may_end=false --temperature=0.9 --out=$out/own_$seed
    tune out/study/stories stories 90
    tune $out/own_$seed own_dpo 15
done
