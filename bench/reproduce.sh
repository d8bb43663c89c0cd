#!/usr/bin/env bash
# The paper's pipeline on one data set: four warm starts, each calibrated and evaluated on parts that it has not seen.
#
#     bench/reproduce.sh truthfulqa_mc ../shared/data/truthfulqa.csv runs/truthfulqa
#     bench/reproduce.sh arc_easy ARC-Easy.train.json runs/arc_easy ARC-Easy.test.json
#     MODEL=Qwen/Qwen2.5-7B bench/reproduce.sh boolq boolq runs/boolq      # the task's own public data, from the hub
#
# A fourth argument is test data of its own; without it the test part of the first file (of a name, its test split) is used.
# RATES are learning rates; "tuned" is the one of CANDIDATES (left out: three for each method) after which the NLL of the
# calibration part is lowest, found once and kept in the folder TUNED, for other data sets too. Runs go on where they stopped.
set -euo pipefail
TASK=$1 DATA=$2 RUNS=$3 TEST=${4:-$2}
METHODS=${METHODS:-"lora ia3 prompt-tuning p-tuning-v2"}
RATES=${RATES:-"5e-5 tuned"}
FRACTIONS=${FRACTIONS:-0.6/0.2/0.2}
SVDECODE=${SVDECODE:-.venv/bin/svdecode}
PYTHON=${PYTHON:-.venv/bin/python}
TUNED=${TUNED:-$RUNS/tuned}
declare -A SEARCHED=([lora]="3e-4 1e-3 3e-3" [ia3]="3e-3 1e-2 3e-2" [prompt-tuning]="3e-3 3e-2 3e-1" [p-tuning-v2]="3e-4 1e-3 3e-3")
model=(${MODEL:+--model "$MODEL"})

train() { # method, rate, folder
  $SVDECODE warmstart --data "$DATA" --output "$3" --method "$1" --learning-rate "$2" \
    --split --fractions "$FRACTIONS" "${model[@]}" --resume
}

tuned() { # method: the best of its candidates, written to TUNED/method
  local rate folder
  [ -f "$TUNED/$1" ] && return
  mkdir -p "$TUNED"
  for rate in ${CANDIDATES:-${SEARCHED[$1]}}; do
    folder=$TUNED/$1-$rate
    train "$1" "$rate" "$folder"
    $SVDECODE eval --task nll --data "$DATA" --split calibration --adapter "$folder" --mu 0 "${model[@]}" --output "$folder/nll"
  done
  "$PYTHON" bench/reproduce_table.py --best "$TUNED/$1-"* > "$TUNED/$1.part"
  mv "$TUNED/$1.part" "$TUNED/$1"
}

for method in $METHODS; do
  for rate in $RATES; do
    folder=$RUNS/$method-$rate
    [ -f "$folder/done" ] && continue
    value=$rate
    if [ "$rate" = tuned ]; then
      tuned "$method"
      value=$(cat "$TUNED/$method")
      # Trained on these very data by the search: the warm start that follows finds it complete.
      [ "$TUNED" != "$RUNS/tuned" ] || [ -d "$folder" ] || cp -r "$TUNED/$method-$value" "$folder"
    fi
    mkdir -p "$folder"
    train "$method" "$value" "$folder"
    $SVDECODE calibrate --data "$DATA" --adapter "$folder" "${model[@]}"
    $SVDECODE eval --task "$TASK" --data "$TEST" --adapter "$folder" --output "$folder/$TASK" \
      "${model[@]}" ${LIMIT:+--limit "$LIMIT"} ${SCORE:+--score "$SCORE"}
    touch "$folder/done"
  done
done
