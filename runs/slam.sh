#!/usr/bin/env bash
# From a blank machine with one 24 GB GPU to Slam: fetch the speech, tokenise it, train, tune with DPO, evaluate, and
# continue a prompt aloud. The first page says how long each step takes. If killed, the same command continues it.
#
#   bash runs/slam.sh --dry          # only the first page, and the commands; so does DRY=1
#   bash runs/slam.sh                # everything
#   bash runs/slam.sh models bench   # only these steps: setup models bench speech pairs train dpo evaluate sample
#   HOURS=5000 bash runs/slam.sh     # a quarter of the speech, read four times: a quarter of network and tokenising
#   TRAIN="config/slam_fast.py --time_budget_hours=6 --tokens=none" bash runs/slam.sh    # another recipe, or less time
#   bash runs/slam_scaled.sh         # two GPUs: Slam (scaled)
#   SCALE=tiny bash runs/slam.sh     # this script on generated speech and embedded models: minutes, no GPU, no network
#
# JUDGE=embedded:smollm2-135m needs no account, but GenPPL can't be compared with the paper's then. DATA=FOLDER: where
# archives are fetched to, and with KEEP=1 kept; OUT=FOLDER: units, runs, results. docs/slam.md has sources and sums.
set -euo pipefail
cd "$(dirname "$0")/.."
steps="setup models bench speech pairs train dpo evaluate sample" only=${*:-} dry=${DRY:-} scale=${SCALE:-slam}
[[ " $only " != *" --dry "* ]] || { dry=1 only=${only/--dry/}; }
for name in $only; do
    [[ " $steps " == *" $name "* ]] || { echo "$name: no such step; there are: $steps" >&2; exit 2; }
done

# ---------------------------------------------------------------- settings of a scale
gpus=1 hours=${HOURS:-20000} out=${OUT:-out} root=. data=${DATA:-data} sources= launch=python preset= train_hours=23.5
tokenizer=$out/mhubert25.safetensors judge=${JUDGE:-meta-llama/Llama-3.2-1B} asr=openai/whisper-large-v3-turbo
speech_flags=config/units_mhubert25.py dpo=config/slam_dpo.py eval_flags= sample_flags=
case $scale in
slam) train=${TRAIN:-config/slam.py} ;;
scaled) gpus=2 hours=${HOURS:-80000} train=${TRAIN:-config/slam_scaled.py} dpo=config/slam_scaled_dpo.py
        train_hours=48 launch="torchrun --nproc_per_node=2" ;;
tiny) out=${OUT:-out/tiny} hours=1 tokenizer=embedded judge=embedded:smollm2-135m asr=embedded:whisper-tiny.en
      speech_flags= root=$out data=$out/data sources="--sources $out/sources.json"
      train="config/slam.py config/study.py --context=512 --micro_batch=2 --batch_tokens=2048 --tokens=30000"
      dpo="config/slam_dpo.py --batch_pairs=4 --steps=4 --warmup=0.25 --n_samples=0"
      eval_flags="--n_generate=4 --allow_eos=false" sample_flags="--continuation_seconds=4" ;;
*) echo "SCALE=$scale: slam, scaled or tiny" >&2; exit 2 ;;
esac
[ -z "$dry" ] || [ -e "$out/sources.json" ] || sources=
name=${train%% *}; name=$(basename "$name" .py)
bench=$root/bench units=$out/units lm=$out/$name tuned=$out/${name}_dpo
[ -z "${TRAIN:-}" ] || train_hours="?"  # what TRAIN says

# ---------------------------------------------------------------- the first page
cards=$(nvidia-smi --query-gpu=memory.total,compute_cap --format=csv,noheader,nounits 2> /dev/null | grep -E '^[0-9]+, ' |
    sort -rn || true)  # "24564, 8.6", the largest first
n_found=$(grep -c . <<< "$cards" || true) cards=$(head -n $gpus <<< "$cards")  # those that are used
smallest=${cards##*$'\n'} smallest=${smallest%,*}  # MiB
if [ "$scale" != tiny ]; then
    if [ "$n_found" -lt $gpus ]; then
        problem="this recipe wants $gpus GPU(s), and nvidia-smi finds $n_found; without one it would take months. \
Install NVIDIA's driver; SCALE=tiny runs on a CPU"
    elif grep -qE ', [1-7]\.' <<< "$cards"; then
        problem="a GPU here is older than Ampere: it has no fast bfloat16, and torch.compile leaves such code out"
    elif [ "$smallest" -lt 7500 ]; then
        problem="the smallest GPU has $smallest MiB of memory: with activation checkpointing the recipe needs 8 GB"
    elif [ "$smallest" -lt 11000 ]; then preset=config/gpu_8gb.py
    elif [ "$smallest" -lt 15000 ]; then preset=config/gpu_12gb.py
    elif [ "$smallest" -lt 22000 ]; then preset=config/gpu_16gb.py
    elif [ "$scale" = scaled ] && [ "$smallest" -lt 34000 ]; then preset=config/gpu_24gb.py
    fi
fi
python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
if [ "$scale" != tiny ]; then
    echo "Slam: $train $preset; $n_found GPU(s), $(df -h --output=avail . | tail -1 | tr -d ' ') of disk free"
    python3 runs/corpora.py page --hours "$hours" --train "$train_hours"
fi
if [ -n "${problem:-}" ]; then
    echo "$problem" >&2
    [ -n "$dry" ] || exit 1
fi

# ---------------------------------------------------------------- how a step is run
run() {  # print a command, or its beginning, and run it; with DRY=1 only print it
    printf '\n$ %.600s\n' "$*"
    [ -n "$dry" ] || "$@"
}

step() {  # step NAME: run the function of that name, and note its seconds
    [ -z "$only" ] || [[ " $only " == *" $1 "* ]] || return 0
    local began=$SECONDS
    printf '\n==== %s\n' "$1"
    "$1"
    [ -n "$dry" ] || printf '%s\t%s\n' "$1" "$((SECONDS - began))" >> "$out/steps.tsv"
}

if [ -z "$dry" ]; then
    mkdir -p "$out"
    exec 9> "$out/slam.lock"  # held until the last process that this script has started ends
    flock -n 9 || { echo "$out: runs/slam.sh is at work here, or a process that a killed one has left; wait for it, \
or end it (\`fuser $out/slam.lock\` names it)" >&2; exit 1; }
    trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
    source runs/setup.sh  # makes .venv, once
fi
# torchrun ends at a hang-up even under nohup; and it leaves its processes 30 s to save, if not told otherwise.
[ -z "$(trap -p HUP)" ] || export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
export PET_SHUTDOWN_TIMEOUT=300

# ---------------------------------------------------------------- the steps
setup() {  # what runs/setup.sh does not do
    if [ "$scale" = tiny ]; then  # the embedded models speak what elsewhere is fetched
        run python -m slam.embedded
        run python synth_stories.py config/demo_stories.py --out="$out/made" --n_train=20 --n_val=6 --n_pairs=0 \
            --n_sblimp=8 --keep_audio
        run python dev/tiny_sources.py "$out/made" "$out/sources.json"
        return
    fi
    python -c "import pyarrow" 2> /dev/null || run python -m pip install -q "$(grep ^pyarrow requirements-test.txt)"
    run python -c "import torch; torch.cuda.is_available() or exit(f'torch {torch.__version__} finds no GPU. It is made for \
CUDA {torch.version.cuda}; the driver may be too old for it (nvidia-smi prints the newest that it knows)')"
    run python -c "import torch; torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device='cuda'))" || {
        echo "torch.compile does not work here: it needs a C compiler and Python's headers (apt install gcc python3-dev)" >&2
        exit 1
    }
}

models() {  # first, so that a missing account shows before the long steps
    local names="$judge $asr"
    [ "$scale" = tiny ] || names="Qwen/Qwen2.5-0.5B slprl/mhubert-base-25hz published $names"
    run python runs/corpora.py models $names
    [ "$tokenizer" = embedded ] || [ -e $tokenizer ] || run python prepare_units.py convert --codebook=$tokenizer
}

bench() {
    run python runs/corpora.py get bench/sLM21-dataset/syntactic/dev bench/sSC bench/tSC --out "$root" $sources
}

drawn() {  # the pieces to train on
    python3 runs/corpora.py list --hours "$hours" $sources
}

get() {
    run python runs/corpora.py get "$1" --out "$data" $sources
}

tokenise() {  # tokenise a piece, then remove it
    local cut=
    [[ $1 != libri_light/* ]] || cut=--max_utterance_seconds=50
    run $launch prepare_units.py $speech_flags --tokenizer=$tokenizer --input="$data/$1" --out="$units/$1" $cut
    [ -n "$dry" ] || touch "$units/$1/done"
    [ -n "$dry${KEEP:-}" ] || rm -rf "${data:?}/$1"
}

speech() {  # while a piece is tokenised, the next one is fetched
    local piece pieces shard fetching=
    pieces="librispeech_dev/dev-clean librispeech_dev/dev-other $(drawn)"
    set --
    for piece in $pieces; do
        if [ -e "$units/$piece/done" ]; then
            [ -n "$dry${KEEP:-}" ] || rm -rf "${data:?}/$piece"  # where a kill came between the two
        elif [ -z "$dry" ] || [[ " $*" != *" ${piece%%/*}/"* ]]; then  # DRY=1 shows one of each corpus
            set -- "$@" "$piece"
        fi
    done
    [ $# = 0 ] || get "$1"
    while [ $# -gt 0 ]; do
        [ -z "$fetching" ] || wait "$fetching" || { tail -n 1 "$out/fetching.log" >&2; exit 1; }
        if [ $# -gt 1 ] && [ -z "$dry" ]; then
            python runs/corpora.py get "$2" --out "$data" $sources > "$out/fetching.log" 2>&1 &
            fetching=$!
        fi
        tokenise "$1"
        shift
    done
    for piece in $pieces; do  # links, so that a corpus' folder has the units of all its pieces: config/slam.py names it
        [ ! -e "$units/$piece/done" ] || for shard in "$units/$piece"/*.safetensors; do
            ln -sf "${piece##*/}/${shard##*/}" "$units/${piece%/*}/${piece##*/}-${shard##*/}"
        done
    done
}

pairs() {
    local swag=$data/pairs/spoken_swag flags=
    [ "$scale" != tiny ] || swag=$swag/train.csv flags="--tts=hibari --n_pairs=8 --n_val=4"
    if ! grep -qs '"done": true' "$out/spoken_swag/synth.json"; then
        get pairs/spoken_swag
        run python synth_stories.py config/spoken_swag.py --swag="$swag" --tokenizer=$tokenizer \
            --out="$out/spoken_swag" $flags
    fi
    [ -n "$dry${KEEP:-}" ] || rm -rf "$data/pairs"
}

train() {
    local speech
    speech=$(drawn | sed "s|^|$units/|" | paste -sd,)
    run $launch train.py $train $preset --out="$lm" --resume \
        --val="$units/librispeech_dev/dev-clean,$units/librispeech_dev/dev-other" --train="$speech"
}

dpo() {
    run $launch dpo.py $dpo $preset --checkpoint="$lm" --pairs="$out/spoken_swag/pairs_train.jsonl" \
        --val_pairs="$out/spoken_swag/pairs_val.jsonl" --out="$tuned" --resume
}

evaluate() {
    if [ -z "$dry" ] && [ "$out/results.md" -nt "$tuned/checkpoint/slam.json" ] &&
            grep -qsF "\`$tuned\`" "$out/results.md" && grep -qsF "judge $judge" "$out/results.md"; then
        echo "$out/results.md: is there already"
        return 0
    fi
    run python eval.py config/eval_slam.py --checkpoint="$lm,$tuned" --tokenizer=$tokenizer --asr=$asr --judge=$judge \
        --path="$bench/sLM21-dataset,$bench/sSC,$bench/tSC" \
        --val="$units/librispeech_dev/dev-clean,$units/librispeech_dev/dev-other" $eval_flags
    [ -z "$dry" ] || return 0
    python dev/slam_report.py "$scale" "$lm" "$tuned" | tee "$out/results.new"
    mv "$out/results.new" "$out/results.md"
}

sample() {
    local prompts=("$bench"/sSC/*.wav)
    run python sample.py --prompt "${prompts[0]}" --checkpoint "$lm" --checkpoint "$tuned" --tokenizer=$tokenizer \
        --from_start --prompt_seconds 3 --out "$out/samples" --overwrite $sample_flags
}

for name in $steps; do step $name; done
