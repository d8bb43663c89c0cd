#!/usr/bin/env bash
# The paper's pipeline on one data file: four warm starts, each calibrated and evaluated on parts that it has not seen.
#
#     bench/reproduce.sh truthfulqa_mc ../shared/data/truthfulqa.csv runs/truthfulqa
#     MODEL=Qwen/Qwen2.5-7B LIMIT= FRACTIONS=0.6/0.2/0.2 bench/reproduce.sh arc_easy ARC-Easy.train.json runs/arc_easy ARC-Easy.test.json
#
# A fourth argument is test data of its own; without it the test part of the first file is used. Runs go on where they stopped.
set -euo pipefail
TASK=$1 DATA=$2 RUNS=$3 TEST=${4:-$2}
METHODS=${METHODS:-"lora ia3 prompt-tuning p-tuning-v2"}
# The paper's 5e-5, and one that is larger by as much as each method takes.
RATES=${RATES:-"5e-5 tuned"}
FRACTIONS=${FRACTIONS:-0.6/0.2/0.2}
SVDECODE=${SVDECODE:-.venv/bin/svdecode}
declare -A TUNED=([lora]=3e-4 [ia3]=3e-3 [prompt-tuning]=3e-2 [p-tuning-v2]=1e-2)
for method in $METHODS; do
  for rate in $RATES; do
    folder=$RUNS/$method-$rate
    value=${TUNED[$method]}
    [ "$rate" = tuned ] || value=$rate
    mkdir -p "$folder"
    [ -f "$folder/done" ] && continue
    $SVDECODE warmstart --data "$DATA" --output "$folder" --method "$method" --learning-rate "$value" \
      --split --fractions "$FRACTIONS" ${MODEL:+--model "$MODEL"} --resume
    $SVDECODE calibrate --data "$DATA" --adapter "$folder" ${MODEL:+--model "$MODEL"}
    $SVDECODE eval --task "$TASK" --data "$TEST" --adapter "$folder" --output "$folder/$TASK" \
      ${MODEL:+--model "$MODEL"} ${LIMIT:+--limit "$LIMIT"} ${SCORE:+--score "$SCORE"}
    touch "$folder/done"
  done
done
