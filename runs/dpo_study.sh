#!/usr/bin/env bash
# What DPO does to a small model, three seeds: with pairs of a story's own next sentence and another's, and with pairs of
# the model's own continuations (AlignSLM); a little of it and much; with and without a repetition penalty.
# Two and a half hours on two CPU cores, most of it for the data. Killed, it goes on.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
out=out/study/dpo
[ -e out/study/data/pairs_val.jsonl ] || python synth_stories.py config/demo_stories.py --out=out/study/data \
    --n_train=640 --n_val=60 --n_pairs=4 --n_sblimp=4 --keep_audio
[ -e out/corpus/audio ] || python synth_stories.py config/corpus_stories.py
[ -e out/corpus_units/report.json ] || python prepare_units.py config/corpus_units.py
# Other stories than those that the models are trained on, for pairs and for scoring.
[ -e out/study/stories/sblimp/manifest.jsonl ] || python synth_stories.py config/study_stories.py

score() {  # score RUN SEED [FLAGS]
    grep -qs '"gen_ppl"' "$1/results.json" || python eval.py --checkpoint="$1" --val=out/study/data/units/val \
        --train=out/study/data/units/train --manifest=out/study/stories/tstorycloze,out/study/stories/sblimp \
        --generate_from=out/study/stories/tstorycloze --n_generate=50 --allow_eos=false --seed="${@:2}"
}

unpenalised() {  # unpenalised RUN SEED [FLAGS]: generated once more, without the penalty
    grep -qs '"gen_ppl_free"' "$1/results.json" || python eval.py --checkpoint="$1" --generate_from=out/study/stories/tstorycloze \
        --n_generate=50 --allow_eos=false --repetition_penalty=1 --suffix=_free --seed="${@:2}"
}

tune() {  # tune NAME PAIRS STEPS SEED
    python dpo.py --checkpoint=$out/lm_0 --pairs=$2/pairs_train.jsonl --val_pairs=$2/pairs_val.jsonl --out=$out/$1_$4 \
        --batch_pairs=16 --steps=$3 --warmup=0.1 --lr=2e-4 --eval_every=1000 --n_samples=0 --seed=$4 --resume
    score $out/$1_$4 $4
}

python train.py config/slam_fast.py config/study.py --train=out/study/data/units/train,out/corpus_units --tokens=8e5 \
    --out=$out/lm_0 --resume
score $out/lm_0 0 --n_seeds=3
unpenalised $out/lm_0 0 --n_seeds=3
python dpo.py pairs --checkpoint=$out/lm_0 --prompts=out/study/stories/pairs_train.jsonl --n_prompts=160 --n=4 \
    --n_val=20 --new_units=100 --allow_eos=false --temperature=0.9 --min_gap=0.3 --out=$out/own_0
for seed in 0 1 2; do
    tune stories out/study/stories 60 $seed
    tune own_dpo $out/own_0 15 $seed
    unpenalised $out/own_dpo_$seed $seed
    tune own_long $out/own_0 60 $seed
    unpenalised $out/own_long_$seed $seed
done
python dev/dpo_study_report.py $out
