#!/usr/bin/env bash
# Units against pieces of several units (BPE), at a small scale (config/study.py), on the same speech, three seeds:
# bits per second of held-out speech. Twenty minutes on two CPU cores after runs/fast_study.sh has made the data.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
data=out/study/data/units
python prepare_units.py verify $data/train $data/val
for pieces in 1000 2000; do
    [ -e out/study/bpe$pieces/tokenizer.safetensors ] || python prepare_units.py bpe --units=$data/train,$data/val \
        --out=out/study/bpe$pieces --n_pieces=$pieces
done
for seed in 0 1 2; do
    python train.py config/slam_fast.py config/study.py --out=out/study/units_$seed --seed=$seed --resume
    for pieces in 1000 2000; do  # as many epochs: the same speech, in fewer tokens
        tokens=$(python - <<PY
from units import UnitReader
print(round(4e5 * UnitReader("out/study/bpe$pieces/train").n_tokens / UnitReader("$data/train").n_tokens))
PY
)
        python train.py config/slam_fast.py config/study.py --train=out/study/bpe$pieces/train --val=out/study/bpe$pieces/val \
            --out=out/study/pieces${pieces}_$seed --tokens=$tokens --seed=$seed --resume
    done
done
python eval.py --checkpoint=out/study/units_0,out/study/units_1,out/study/units_2 --train=$data/train --val=$data/val
for pieces in 1000 2000; do
    runs=out/study/pieces$pieces
    python eval.py --checkpoint=${runs}_0,${runs}_1,${runs}_2 --train=${runs/pieces/bpe}/train --val=${runs/pieces/bpe}/val
done
