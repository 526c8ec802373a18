#!/usr/bin/env bash
# Slam in miniature: what a model of 14.5M parameters learns from some 210 h of synthesised stories, and what each part
# of the recipe does there. docs/mini.md has the results, and says how to read them.
#
#   bash runs/mini_slam.sh              # everything: on two CPU cores 6 h for data, 8 for the curve, 12 for the rest
#   bash runs/mini_slam.sh curve dpo    # only these steps: data lr curve sentences dpo average ship listen scratch slam
#                                       shape bpe report
#   SCALE=gpu bash runs/mini_slam.sh    # more tokens, and the whole base too, on out/mini's data, in out/mini_gpu
#   SCALE=tiny bash runs/mini_slam.sh   # only to see that the script works: minutes, in out/mini_tiny
#
# The most important steps come first. If killed, start it again: it makes nothing twice. Environment variables:
#   OUT=FOLDER  DATA=FOLDER    folder of the runs; folder of the parts, if it is another
#   PARTS=11                   parts of 2,500 training stories beside part0
#   BUDGETS="300000 600000"    tokens of the curve's runs; WHOLE="4800000": of those with all 30 layers
#   RATES="0.01 0.02"          learning rates to choose from; LR=0.006: no choice; WHOLE_LR=0.003: with all 30 layers
#   SHIP=RUN                   the run to pack
#   HOURS=0.1                  of each run of `shape`
#   JOBS=3                     so many runs at once (of DPO twice), on a GPU, which one small model does not fill
#   NO_EVAL=1                  only train, where there are no wav files; the same command without it evaluates later
#
# What is chosen (learning rate, the run that DPO starts from) is chosen by validation loss, nothing by pairs.
set -euo pipefail
steps="data lr curve sentences dpo average ship listen scratch slam shape bpe report" only=${*:-${ONLY:-}}
for name in $only; do
    [[ " $steps " == *" $name "* ]] || { echo "$name: no such step; there are: $steps" >&2; exit 2; }
done

# ---------------------------------------------------------------- settings of a scale
# size: flags of every run; middle: the budget of single comparisons; rates: learning rates to choose from at `middle`;
# hours: of each run in `shape`; whole: budgets of runs with all 30 layers of the base; long: flags of runs of 9M tokens
# and more; glimpse: train.py's one file of validation units (eval.py takes all); few_*: flags that make the last steps
# small
stories= whole= size= long= glimpse=/00000.safetensors few_texts= few_pairs= few_steps=
middle=1200000 scratch="300000 1200000 4800000" rates="0.003 0.006 0.012" hours=0.25 depths="2 4 8" pieces=2000
case ${SCALE:-cpu} in
cpu) budgets="150000 300000 600000 1200000 2400000 4800000 9600000" ;;
gpu) OUT=${OUT:-out/mini_gpu} DATA=${DATA:-out/mini}
     budgets="300000 600000 1200000 2400000 4800000 9600000 19200000 32000000" whole="1200000 4800000 19200000"
     size="--micro_batch=8 --batch_tokens=8192 --save_every=10000 --compile=false" long=--compile=true hours=0.01
     stories="--batch=2048 --workers=$(nproc)" few_texts="--compile=false --batch=100"  # compiling takes longer
     few_pairs="--batch=125" few_steps="--micro_batch=8 --compile=false" glimpse= ;;
tiny) OUT=${OUT:-out/mini_tiny} PARTS=${PARTS:-1} budgets="2000 4000 8000 12000 16000" middle=8000 scratch="4000 8000"
      JOBS=${JOBS:-2}
      rates="0.006 0.012" hours=0.003 depths="1 2" pieces=600
      size="--n_layers=1 --context=512 --micro_batch=2 --batch_tokens=1024"
      stories="--n_train=40 --n_val=8 --n_pairs=4 --n_sblimp=8 --max_sentences=6 --max_new_tokens=80 --batch=64"
      few_texts="--n_generate=2 --n_seeds=2" few_pairs="--n_prompts=8 --n=2 --n_val=1 --min_gap=0.01 --min_words=1"
      few_steps="--batch_pairs=2 --steps=2 --warmup=0.5" ;;
*) echo "SCALE=$SCALE: cpu, gpu or tiny" >&2; exit 2 ;;
esac
source "$(dirname "$0")/setup.sh"
out=${OUT:-out/mini} parts=${PARTS:-11} rates=${RATES:-$rates} budgets=${BUDGETS:-$budgets} whole=${WHOLE-$whole}
failed= pids=
data=${DATA:-$out} hours=${HOURS:-$hours}
part0=$out/part0 fast="config/slam_fast.py config/mini.py --dtype=auto"
whole_base="$fast --n_layers=none --lr=${WHOLE_LR:-0.006} --micro_batch=8 --batch_tokens=16384 --compile=true"
pairs=$part0/tstorycloze,$part0/sstorycloze,$part0/sblimp
speech=$(seq -s, -f "$out/part%g/units/train" 0 "$parts") held_out=$part0/units/val tokenizer=
mkdir -p "$out" "$data"
[ "$data" = "$out" ] || for k in $(seq 0 "$parts"); do ln -sfn "$(realpath "$data")/part$k" "$out/part$k"; done
exec 9> "$out/mini.lock"  # held until the last process that this script has started ends
flock -n 9 || { echo "$out: runs/mini_slam.sh is at work here, or a process that a killed one has left" >&2; exit 1; }

# ---------------------------------------------------------------- a run, and its evaluation
has() {  # has RUN METRIC: whether its results have it
    grep -qs "\"$2\": {" "$1/results.json"
}

finished() {
    grep -qs '"finished": true' "$1/checkpoint/slam.json"
}

train() {  # train NAME CONFIG... FLAG...: a run, and its evaluation; train.py refuses one of other data or settings
    local run=$out/$1; shift
    python train.py $size "$@" --train="$speech" --val="$held_out$glimpse" --out="$run" --resume
    evaluate "$run"
}

beside() {  # beside COMMAND...: in the background, where JOBS are allowed; `finish` waits for all
    [ "${JOBS:-1}" -gt 1 ] || { "$@"; return; }
    [ "$(jobs -rp | wc -l)" -lt "$JOBS" ] || wait -n || failed=1
    "$@" & pids="$pids $!"
}

finish() {  # wait for all that runs in the background; ends the script if one of it failed, after the others' end
    local pid
    for pid in $pids; do wait "$pid" || failed=1; done
    pids=
    [ -z "$failed" ] || { echo "a run failed (above); the others have ended, and the same command goes on" >&2; exit 1; }
}

evaluate() {  # evaluate RUN: validation loss and accuracies, unless they are there
    [ -n "${NO_EVAL:-}" ] || has "$1" sblimp || python eval.py config/mini_eval.py --checkpoint="$1" \
        --val="$held_out" --manifest="$pairs" --tokenizer="$tokenizer"
}

generate() {  # generate RUN: GenPPL and auto-BLEU, unless they are there
    [ -n "${NO_EVAL:-}" ] || has "$1" gen_ppl || python eval.py config/mini_eval.py --checkpoint="$1" --val= \
        --manifest= --generate_from="$part0/tstorycloze" $few_texts
}

n_tokens() {  # n_tokens FOLDER,FOLDER...: how many there are
    python -c "from slam.units import UnitReader; print(UnitReader(*'$1'.split(',')).n_tokens)"
}

affordable() {  # affordable TOKENS: whether they are at most two epochs
    [ -n "${unique:-}" ] || unique=$(n_tokens "$speech") || exit 1
    [ "$1" -gt $((2 * unique)) ] || return 0
    echo "$1 tokens: skipped, as they are more than two epochs of the $unique there are"
    return 1
}

need_rate() {  # the chosen learning rate
    rate=${LR:-$(cat "$out/lr" 2> /dev/null || true)}
    [ -n "$rate" ] || lr
}

best_run() {  # best_run twist: the best of the curve's budgets; of `whole`, the best with all layers
    local tokens list=$budgets
    [ "$1" = twist ] || list=$whole
    python dev/mini_report.py best $(for tokens in $list; do echo "$out/$1_${tokens}"_[0-9]; done)
}

# ---------------------------------------------------------------- the steps
synth() {  # synth NAME CONFIG FLAG...: a folder of speech, unless it is there
    local made=$data/$1; shift
    grep -qs '"done": true' "$made/synth.json" || python synth_stories.py "$@" --out="$made"
}

part() {  # part K: part0 with validation stories and pairs; the others with as few of these as synth_stories.py makes
    if [ "$1" = 0 ]; then
        synth part0 config/mini_stories.py $stories
        [ -e "$data/part0/sstorycloze/manifest.jsonl" ] || python dev/hard_negatives.py "$data/part0"
    else
        synth part$1 config/mini_stories.py --seed=300$1 --n_train=2500 --n_val=4 --n_sblimp=4 --n_pairs=4 $stories
    fi
}

data() {
    for k in $(seq 0 "$parts"); do part "$k"; done
}

lr() {  # the learning rate of all runs but slam.py's: the best at the middle budget
    local chosen
    [ -z "${LR:-}" ] || return 0
    for rate in $rates; do beside train lr${rate}_${middle}_0 $fast --lr=$rate --tokens=$middle; done
    finish
    chosen=$(python dev/mini_report.py best "$out"/lr*_${middle}_0)
    rate=${chosen##*/lr} rate=${rate%%_*}
    case $rate in ${rates%% *} | ${rates##* }) echo "the best rate, $rate, is at the border of $rates" ;; esac
    echo "$rate" > "$out/lr"
}

curve() {  # each budget with its own whole schedule: three seeds, one for the two largest
    local seed tokens run largest= list=$budgets
    need_rate
    if [ -e "$out/lr${rate}_${middle}_0" ] && [ ! -e "$out/twist_${middle}_0" ]; then
        ln -s lr${rate}_${middle}_0 "$out/twist_${middle}_0"  # the run by which the rate was chosen
    fi
    for tokens in $(tac -s' ' <<< "$whole "); do  # the longest first
        affordable $tokens || continue
        beside train whole_${tokens}_0 $whole_base --tokens=$tokens --init=first_rows
    done
    for seed in 0 1 2; do
        for tokens in $(tac -s' ' <<< "$list "); do
            affordable $tokens || continue
            beside train twist_${tokens}_$seed $fast --lr=$rate --tokens=$tokens --seed=$seed \
                $([ $tokens -lt 9000000 ] || echo "$long")
        done
        list="  $budgets" list=${list% * *}  # the spaces: one budget or two leave none
    done
    finish
    for tokens in $budgets; do [ ! -e "$out/twist_${tokens}_0" ] || largest="${largest##* } $tokens"; done
    for tokens in $largest; do beside generate "$out/twist_${tokens}_0"; done
    finish
    # Once: unigrams and bigrams of the units, and a text LM on the transcripts.
    run=$out/twist_${budgets%% *}_0
    [ -n "${NO_EVAL:-}" ] || has "$run" sblimp_text_lm || python eval.py config/mini_eval.py --checkpoint="$run" \
        --val="$held_out" --manifest="$pairs" --train="$speech" --text_judge=embedded:smollm2-135m
    finish
}

sentences() {  # the best run continues on sentences with the tested grammar and on one more part of stories
    local best more more_twice share n
    need_rate
    best=$(best_run twist)
    part $((parts + 1))
    synth sentences config/mini_sentences.py $stories --max_new_tokens=0
    synth sentences2 config/mini_sentences.py $stories --max_new_tokens=0 --seed=3200
    more=$data/sentences/units/train,$data/part$((parts + 1))/units/train
    more_twice=$more,$data/sentences2/units/train,$data/part$((parts + 1))/units/train
    speech=$more_twice sentences_run "$best" $(n_tokens "$more_twice")
    n=$(n_tokens "$more")
    for share in 1 4 8; do speech=$more sentences_run "$best" $((n / share)); done
}

sentences_run() {  # sentences_run RUN TOKENS: continues RUN on $speech
    train sentences_$2_0 $fast --base="$1/checkpoint" --n_layers=none --init=first_rows --tokens=$2 \
        --lr="$(python -c "print($rate / 2)")"
}

dpo() {  # on the best run's own continuations, and on those of the best with all layers
    local best
    best=$(best_run twist)
    beside dpo_of "$best"
    if [ -n "$whole" ]; then
        best=$(best_run whole)
        beside dpo_of "$best"
    fi
    finish
}

dpo_of() {  # dpo_of RUN [OTHER_own]: with pairs of its own continuations, or of another run's
    local best=$1 own=${2:-$1_own} seed pids=
    generate "$best"
    [ -e "$own/pairs_train.jsonl" ] || python dpo.py pairs config/mini_pairs.py --checkpoint="${own%_own}" \
        --prompts="$part0/units/train" --out="$own" $few_pairs
    for seed in 0 1 2; do beside dpo_run "$best" $seed "$own"; done
    finish
}

dpo_run() {  # dpo_run RUN SEED PAIRS
    local run=$1_dpo_$2
    finished "$run" || python dpo.py config/mini_dpo.py --checkpoint="$1" --out="$run" --seed=$2 $few_steps \
        --pairs="$3/pairs_train.jsonl" --val_pairs="$3/pairs_val.jsonl" --resume
    evaluate "$run"
    generate "$run"
}

average() {  # averages the weights of the best run and of its longest continuation; DPO with the best run's pairs
    local best after= other run=$out/average_50_0
    best=$(best_run twist)
    for other in $(ls -dv "$out"/sentences_*_0); do  # the last match: its finished continuation with most tokens
        ! finished "$other" || ! grep -qF "\"base\": \"$best/checkpoint\"" "$other/config.json" || after=$other
    done
    [ -n "$after" ] || { echo "average: no finished run of \`sentences\` that went on from $best" >&2; exit 1; }
    finished "$run" || python dev/average.py "$best" "$after" "$run" --share=0.5
    evaluate "$run"
    dpo_of "$run" "${best}_own"
}

ship() {  # a file of the size that the repository carries
    local run=${SHIP:-$out/average_50_0_dpo_0}
    python dev/pack.py "$run" "$out/slam_mini.safetensors"
    ls -l "$out/slam_mini.safetensors"
}

listen() {  # ten prompts, in people's voices and the TTS', continued before and after DPO: a page and its transcripts
    local prompts run=${SHIP:-$out/average_50_0_dpo_0}
    [ -d out/people/audiobook ] && [ -d out/people/telephone ] || python dev/voices.py people || echo "without people's voices"
    prompts=$({ find out/people/audiobook -name '*.wav' 2> /dev/null | sort | awk 'NR <= 3'
                find out/people/telephone -name '*.wav' 2> /dev/null | sort | awk 'NR % 40 == 20 && NR < 140'
                find "$part0/tstorycloze" -name '*_positive.wav' | sort | awk 'NR <= 4'; } | paste -sd,)
    python sample.py --prompt="$prompts" --checkpoint="${run%_dpo_*},$run" --out="$out/listen" --prompt_seconds=3 \
        --from_start --overwrite
    python dev/mini_report.py listen "$out/listen" | tee "$out/listen.md"
}

scratch() {
    need_rate
    for tokens in ${whole##* }; do
        affordable $tokens || continue
        beside train wholescratch_${tokens}_0 $whole_base --tokens=$tokens --init=none
    done
    for tokens in $scratch; do
        affordable $tokens || continue
        beside train scratch_${tokens}_0 $fast --lr=$rate --tokens=$tokens --init=none
    done
    finish
}

slam() {  # the settings of the paper, with its learning rate
    train slam_${middle}_0 config/slam.py config/mini.py --tokens=$middle
}

shape() {  # depth, from the text LM, and width, from scratch in its proportions (576 is its own), for the same time
    need_rate
    for layers in $depths; do
        train layers${layers}_hours_0 $fast --lr=$rate --tokens=none --time_budget_hours=$hours --n_layers=$layers
    done
    train width576_hours_0 $fast --lr=$rate --tokens=none --time_budget_hours=$hours --init=none
    for width in 192 384; do
        train width${width}_hours_0 $fast --lr=$rate --tokens=none --time_budget_hours=$hours \
            --shape="{\"hidden_size\": $width, \"intermediate_size\": $((width * 8 / 3)), \"num_hidden_layers\": 4,
                \"num_attention_heads\": $((width / 64)), \"num_key_value_heads\": $((width / 192)),
                \"model_type\": \"llama\"}"
    done
}

bpe() {  # as many pieces as units: the same compute, two to three times as much speech
    local names
    need_rate
    affordable $((3 * middle)) || return 0
    mkdir -p "$out/units"  # links, because the folders of pieces get the names of the folders of units
    ln -sfn ../part0/units/val "$out/units/val"
    for k in $(seq 0 "$parts"); do ln -sfn "../part$k/units/train" "$out/units/part$k"; done
    names=$(seq -s, -f "$out/units/part%g" 0 "$parts")
    [ -e "$out/bpe$pieces/tokenizer.safetensors" ] || python prepare_units.py bpe --units="$names,$out/units/val" \
        --out="$out/bpe$pieces" --n_pieces=$pieces --overwrite
    speech=$(seq -s, -f "$out/bpe$pieces/part%g" 0 "$parts") held_out=$out/bpe$pieces/val \
        tokenizer=$out/bpe$pieces/tokenizer.safetensors \
        train pieces${pieces}_${middle}_0 $fast --lr=$rate --tokens=$middle
}

report() {
    python dev/mini_report.py "$out" "$out/mini.png" | tee "$out/results.new"
    mv "$out/results.new" "$out/results.md"
}

for name in $steps; do
    [ -z "$only" ] || [[ " $only " == *" $name "* ]] || continue
    began=$SECONDS
    printf '\n== %s\n' "$name"
    "$name"
    printf '%s\t%s\n' "$name" "$((SECONDS - began))" >> "$out/seconds.tsv"
done
