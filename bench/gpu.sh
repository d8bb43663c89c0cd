#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 8 minutes, on a machine without network: correctness first, then speed.
# Needs torch >= 2.11, triton >= 3.6, transformers, peft and pytest; installs nothing but this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
python -m pip install --quiet --no-deps --no-build-isolation --no-index .
python -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())'
# (a) the suite on the device, uninterpreted, and (b) graphs, streams, a second device
python -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_fused_steer.py tests/test_optimal_strength.py \
    tests/test_steered_nll.py tests/test_steering_vector.py tests/test_steer_sample.py tests/test_backward.py
# a wrong address in the kernels shows here, where the machine has the tool
if command -v compute-sanitizer > /dev/null; then
    compute-sanitizer --error-exitcode 1 python -m pytest -q -p no:cacheprovider tests/test_fused_steer.py -k 'edges or strided'
fi
# (c) benchmarks
card=$(python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
result="bench/results/$card-$(date +%Y-%m-%d).json"
python bench/operators.py --device cuda --budget 240 --output "$result"
python bench/report.py "$result" --png "${result%.json}.png" || python bench/report.py "$result"
