#!/usr/bin/env bash
# Units against pieces of several units (BPE), at a small scale (config/study.py): bits per second of held-out speech,
# for the same speech (three seeds) and for the same number of tokens, which is the same compute (one seed).
# Half an hour on two CPU cores after runs/fast_study.sh has made the data. If killed, start it again to continue.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
data=out/study/data/units
for pieces in 1000 2000; do
    [ -e out/study/bpe$pieces/tokenizer.safetensors ] || python prepare_units.py bpe --units=$data/train,$data/val \
        --out=out/study/bpe$pieces --n_pieces=$pieces --overwrite
done
train_pieces() {  # pieces, tokens, run
    python train.py config/slam_fast.py config/study.py --train=out/study/bpe$1/train --val=out/study/bpe$1/val \
        --tokens=$2 --out=out/study/$3 --seed=$seed --resume
}
for seed in 0 1 2; do
    python train.py config/slam_fast.py config/study.py --out=out/study/units_$seed --seed=$seed --resume
    for pieces in 1000 2000; do
        same_speech=$(python -c "from slam.units import UnitReader; print(round(4e5 * \
            UnitReader('out/study/bpe$pieces/train').n_tokens / UnitReader('$data/train').n_tokens))")
        train_pieces $pieces $same_speech pieces${pieces}_$seed
    done
done
seed=0
for pieces in 1000 2000; do
    train_pieces $pieces 400000 pieces${pieces}_compute
done
python eval.py --checkpoint=out/study/units_0,out/study/units_1,out/study/units_2 --train=$data/train --val=$data/val
for pieces in 1000 2000; do
    run=out/study/pieces$pieces
    python eval.py --checkpoint=${run}_0,${run}_1,${run}_2,${run}_compute --train=out/study/bpe$pieces/train \
        --val=out/study/bpe$pieces/val
done
