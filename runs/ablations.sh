#!/usr/bin/env bash
# The paper's ablations of pre-training. Each run is config/slam.py, but with the figure's settings where the paper had
# not yet chosen those of slam.py.
#
#   bash runs/ablations.sh models        # families and sizes, with and without TWIST (figures 2 and 3): context 512,
#                                        # inverse square root, the text LM's RoPE theta, speech of people only
#   bash runs/ablations.sh optimizers    # optimiser and schedule (figure 4): speech of people only
#   bash runs/ablations.sh data          # what is trained on
#   bash runs/ablations.sh batch         # context and batch
#   bash runs/ablations.sh models --dry  # only print the commands
#   OUT=out/ablations_1h bash runs/ablations.sh optimizers -- --time_budget_hours=1 --tokens=none --alpha_warmup=454
#
# Flags after `--` go to every run. Finished runs are skipped, killed ones continue. Each run has slam.py's 1.4B tokens.
# Hours on an A5000: the paper's 23.5 for Qwen2.5-0.5B, others by their FLOPs at context 1,024. GB: what `python
# dev/bench.py memory config/slam.py --base=...` counts.
#
#                    parameters  hours    GB                        parameters  hours    GB
#     Qwen2.5-0.5B         358M   23.5  15.3      SmolLM2-360M            315M   22.1  14.9
#     OPT-125M              87M    6.2   2.8      MobileLLM-125M          106M    8.3   7.8
#     OPT-350M             306M   20.8   7.7      MobileLLM-350M          315M   22.1  14.9
#     SmolLM2-135M         106M    8.3   7.8      Pythia-160M / 410M  86M/303M  6.1/20.7  3.7/10.1
#
# The optimisers are compared with fp32 weights (AdamW: 18.9 GB): AdEMAMix's slow mean moves by 1e-4 of a gradient a
# step, which bf16 rounds away. Its alpha_warmup, which the others do not read, is the run's length in steps (454 in an
# hour at the paper's speed). The paper's third, AdaLomo, is far behind and not here; Muon is our addition. `data` needs
# units of corpora that nothing here fetches (SWC, Tedlium, PeopleSpeech, VoxPopuli). `data` and `batch` are as slam.py;
# context 512 halves the memory of a row.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-}; shift || true
dry=; [ "${1:-}" = --dry ] && { dry=echo; shift; }
[ "${1:-}" = -- ] && shift
[ -z "$what" ] || [ -n "$dry" ] || source runs/setup.sh
more=("$@")

run() { # run NAME FLAG...
    local name=$1; shift
    $dry python train.py config/slam.py --out="${OUT:-out/ablations}/$name" "$@" "${more[@]}" --resume
}

people=out/units/libri_light,out/units/librispeech
case $what in
models)
    for base in Qwen/Qwen2.5-0.5B facebook/opt-125m facebook/opt-350m HuggingFaceTB/SmolLM2-135M \
                HuggingFaceTB/SmolLM2-360M facebook/MobileLLM-125M facebook/MobileLLM-350M EleutherAI/pythia-160m \
                EleutherAI/pythia-410m; do
        for init in first_rows none; do
            run "${base##*/}_$init" --base="$base" --init=$init --context=512 --schedule=inverse_sqrt \
                --rope_theta=none --train=$people
        done
    done ;;
optimizers)
    for optimizer in adamw ademamix; do
        for schedule in cosine inverse_sqrt; do
            run "${optimizer}_$schedule" --optimizer=$optimizer --schedule=$schedule --dtype=bfloat16 \
                --alpha_warmup=10681 --train=$people
        done
    done
    run muon_cosine --optimizer=muon --dtype=bfloat16 --train=$people ;;
data)
    diverse=out/units/swc,out/units/tedlium,out/units/peoplespeech,out/units/voxpopuli
    run libri --train=$people
    run libri_diverse --train=$people,$diverse
    run libri_tinystories --train=$people,out/units/stinystories
    run libri_diverse_tinystories --train=$people,$diverse,out/units/stinystories ;;
batch)
    for context in 512 1024; do
        for rows in 128 256; do run "context${context}_batch$rows" --context=$context --batch_tokens=$((context * rows)); done
    done ;;
*)
    sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
