#!/usr/bin/env bash
# The whole pipeline from the shell: warm start, calibration, evaluation, one answer.
#
#     examples/warm_start.sh [DATA] [OUTPUT]
#
# DATA is a JSONL file with prompt and completion; left out, a small file of sums is made. OUTPUT is the folder of the adapter
# and of everything that is found out about it; left out, it is warm-start-output. Environment variables:
#
#     SVDECODE   the command (left out: svdecode)
#     MODEL      a model's folder or hub name (left out: the bundled SmolLM2-135M-Instruct)
set -euo pipefail
OUTPUT=${2:-warm-start-output}
DATA=${1:-$OUTPUT.jsonl}
SVDECODE=${SVDECODE:-svdecode}
model=(${MODEL:+--model "$MODEL"})

if [ $# -eq 0 ]; then
  for a in 1 2 3 4 5 6 7 8; do
    for b in 1 2 3 4 5 6; do
      echo "{\"prompt\": \"$a + $b =\", \"completion\": \" $((a + b))\"}"
    done
  done > "$DATA"
fi

# One data set is split once: 60% train, 20% calibrate, 20% test. The split is recorded in OUTPUT, and found there later.
$SVDECODE warmstart --data "$DATA" --split --output "$OUTPUT" --learning-rate 2e-4 --overwrite "${model[@]}"

# mu, how sure, does it help: svdecode.json, a report and a figure beside the adapter.
$SVDECODE calibrate --data "$DATA" --adapter "$OUTPUT" "${model[@]}"

# The pre-trained model, the warm start and SVDecode on the test part, with paired intervals.
$SVDECODE eval --task nll --data "$DATA" --adapter "$OUTPUT" --output "$OUTPUT/eval" "${model[@]}"

# One answer from the steered distribution.
$SVDECODE generate "3 + 5 =" --adapter "$OUTPUT" --max-new-tokens 8 "${model[@]}"
