#!/usr/bin/env bash
# Speech only against speech and text in one model, from the same text LM, at equal compute: validation loss of speech,
# text perplexity, and pairs in four directions at three budgets. Ends with a table and docs/interleaving.png.
#
#   bash runs/interleaving_study.sh                   # SmolLM2's first four layers, 700 stories: an hour on two cores
#   SEEDS="0 1" bash runs/interleaving_study.sh       # two seeds
#   ARMS="speech interleaved side_by_side" bash runs/interleaving_study.sh   # and a mix with no interleaved utterances
#   SCALE=gpu bash runs/interleaving_study.sh         # all its layers, 10,000 stories
#   SCALE=tiny bash runs/interleaving_study.sh        # a few steps, to see that everything runs
#
# Budgets are FLOPs, those of a token by slam/costs.py: 6 N + 12 L d T. The head counts once, although the backward pass
# recomputes a text head's logits; T is 250 keys. The learning rate is constant, so that each budget's run can continue
# that of the budget before. If killed, start it again to continue. DATA=FOLDER: stories made with --keep_audio.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
scale=${SCALE:-cpu}
base=embedded:smollm2-135m workers=$(nproc) arms=${ARMS:-speech interleaved} seeds=${SEEDS:-0}
how="--micro_batch=1 --batch_tokens=1024 --lr=1e-3"
case $scale in
cpu) data=${DATA:-out/study/data} out=out/interleaving layers=4 budgets="1e13 2e13 4e13" n_train=640 n_val=60
     n_pairs=300 ;;
gpu) data=${DATA:-out/interleaving_gpu/data} out=out/interleaving_gpu layers=30 budgets="3e14 1e15 3e15" n_train=10000
     n_val=100 n_pairs=500 how="--micro_batch=16 --batch_tokens=32768 --lr=5e-4" ;;
tiny) data=${DATA:-out/interleaving_tiny/data} out=out/interleaving_tiny layers=2 budgets="2e11 4e11 8e11" n_train=6
      n_val=4 n_pairs=4 how="--micro_batch=1 --batch_tokens=512 --context=512 --lr=1e-3" ;;
*) echo "SCALE=$scale: cpu, gpu or tiny" >&2; exit 2 ;;
esac
out=${OUT:-$out} words=$out/words

# ---------------------------------------------------------------- stories, their words, and other stories as pairs
grep -qs '"done": true' $data/synth.json || python synth_stories.py config/demo_stories.py --out=$data \
    --n_train=$n_train --n_val=$n_val --n_pairs=4 --n_sblimp=4 --keep_audio --workers=$workers
grep -qs '"done": true' $out/benchmark/synth.json || python synth_stories.py config/demo_stories.py \
    --out=$out/benchmark --n_train=4 --n_val=$n_pairs --n_pairs=4 --n_sblimp=4 --seed=1000 --workers=$workers
for split in val train; do
    [ -e $words/$split.done ] || python -m slam.alignment --units=$data/units/$split --audio=$data/audio \
        --suffix=.flac --text_lm=$base --out=$words/$split
    touch $words/$split.done
done

# ---------------------------------------------------------------- training and evaluation
flops() {  # flops VOCABULARY: of a token, forward and backward
    python -c "from model import UnitLM; from slam.costs import flops_per_token as f
print(f(UnitLM.twist('$base', $1, 'none', $layers), 250))"
}

run() {  # run NAME TOKENS LABEL FLAGS: train on from the budget before, score, and keep the results as LABEL.json
    local name=$out/$1 tokens=$2 label=$3; shift 3
    [ ! -e $name/$label.json ] || return 0
    python train.py --train=$words/train --val=$words/val --base=$base --n_layers=$layers --rope_theta=none \
        --tokens=$tokens --schedule=constant --warmup=0.05 --grad_clip=1 $how --out=$name "$@" --resume
    python eval.py --checkpoint=$name --manifest=$out/benchmark/tstorycloze --text_judge=$base
    cp $name/results.json $name/$label.json
}

speech=$(flops 502) mixed=$(flops $((504 + 49152)))
run start 0 0 --init=keep_text --mix=1,1,1
for seed in $seeds; do
    for arm in $arms; do
        case $arm in
        speech) cost=$speech flags="--init=random" ;;
        interleaved) cost=$mixed flags="--init=keep_text --mix=1,1,1" ;;
        side_by_side) cost=$mixed flags="--init=keep_text --mix=1,1,0" ;;
        *) echo "ARMS: speech, interleaved, side_by_side, not $arm" >&2; exit 2 ;;
        esac
        for budget in $budgets; do
            run ${arm}_$seed "$(python -c "print(int($budget / $cost))")" $budget $flags --seed=$seed
        done
    done
done
[ $scale = cpu ] && picture=docs/interleaving.png || picture=$out/interleaving.png
python dev/interleaving_report.py $out $picture
