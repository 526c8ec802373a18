#!/usr/bin/env bash
# What DPO does at a small scale, three seeds: pairs of a story's own next sentence and another's, and pairs of the
# model's own continuations (AlignSLM); enough of it and too much; with and without a repetition penalty.
# Three hours on two CPU cores, data included. Killed, it goes on.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
out=out/study/dpo
[ -e out/study/data/pairs_val.jsonl ] || python synth_stories.py config/demo_stories.py --out=out/study/data \
    --n_train=640 --n_val=60 --n_pairs=4 --n_sblimp=4 --keep_audio
[ -e out/corpus/audio ] || python synth_stories.py config/corpus_stories.py
[ -e out/corpus_units/report.json ] || python prepare_units.py config/corpus_units.py
# Other stories than those that the models are trained on, for pairs and for scoring.
[ -e out/study/stories/sblimp/manifest.jsonl ] || python synth_stories.py config/study_stories.py

tune() {  # tune NAME PAIRS STEPS
    python dpo.py --checkpoint=$out/lm_$seed --pairs=$2/pairs_train.jsonl --val_pairs=$2/pairs_val.jsonl \
        --out=$out/$1_$seed --batch_pairs=16 --steps=$3 --warmup=0.1 --lr=2e-4 --eval_every=1000 --n_samples=0 \
        --seed=$seed --resume
    score $out/$1_$seed
}

score() {  # score RUN
    [ -e "$1/generated.jsonl" ] || python eval.py --checkpoint="$1" --val=out/study/data/units/val \
        --train=out/study/data/units/train --manifest=out/study/stories/tstorycloze,out/study/stories/sblimp \
        --generate_from=out/study/stories/tstorycloze --n_generate=50 --may_end=false
}

unpenalised() {  # unpenalised RUN: generated once more, without the penalty
    [ -e "$1/generated_free.jsonl" ] || python eval.py --checkpoint="$1" --generate_from=out/study/stories/tstorycloze \
        --n_generate=50 --may_end=false --repetition_penalty=1 --suffix=_free
}

for seed in ${SEEDS:-0 1 2}; do
    python train.py config/slam_fast.py config/study.py --train=out/study/data/units/train,out/corpus_units \
        --tokens=8e5 --out=$out/lm_$seed --seed=$seed --resume
    score $out/lm_$seed
    python dpo.py pairs --checkpoint=$out/lm_$seed --prompts=out/study/stories/pairs_train.jsonl --n_prompts=160 --n=4 \
        --n_val=20 --new_units=100 --may_end=false --temperature=0.9 --min_gap=0.3 --out=$out/own_$seed
    tune stories out/study/stories 60
    tune own_dpo $out/own_$seed 15
    tune own_long $out/own_$seed 60
    unpenalised $out/lm_$seed
    unpenalised $out/own_long_$seed
done
python runs/dpo_study_report.py $out
