#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 8 minutes, on a machine without network: correctness first, then speed.
# Needs torch >= 2.11, triton >= 3.6, transformers, peft and pytest; installs nothing but this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
# with the CUDA C++ kernels where there is an nvcc
command -v nvcc > /dev/null && export SVDECODE_BUILD=cuda
python3 -m pip install --quiet --no-deps --no-build-isolation --no-index .
python3 -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())'
# (a) the suite on the device, uninterpreted, and (b) graphs, streams, a second device. From tests/, so that what is tested is
# the installed package and not this folder.
(
    cd tests
    python3 -m pytest -q test_gpu.py test_fused_steer.py test_optimal_strength.py test_steered_nll.py \
        test_steering_vector.py test_steer_sample.py test_steer_topk.py test_backward.py test_properties.py test_compiled.py
    python3 -m pytest -q test_generate.py test_lazy.py test_recipes.py
    # a wrong address in the kernels shows here, where the machine has the tool
    if command -v compute-sanitizer > /dev/null; then
        compute-sanitizer --error-exitcode 1 python3 -m pytest -q test_fused_steer.py -k 'edges and plain or strided'
    fi
)
# (c) benchmarks
card=$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
result="bench/results/$card-$(date +%Y-%m-%d).json"
python3 bench/operators.py --device cuda --budget 240 --output "$result"
for adapter in lora pretrained; do
    python3 bench/decoding.py --adapter $adapter --dtype bfloat16 --json "bench/results/$card-decoding-$adapter-$(date +%Y-%m-%d).json"
done
python3 bench/report.py "$result" --png "${result%.json}.png" || python3 bench/report.py "$result"
