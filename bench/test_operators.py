"""Microbenchmarks of the operators under pytest-benchmark: `pytest bench/test_operators.py`, on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from inputs import gold_labels, peaked_logits

import svdecode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(benchmark, call) -> None:
    def once():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(once)


@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("output", ["dense", "scalars", "greedy", "topk", "sampled", "nll"])
def test_operator(benchmark, output, rows, vocabulary):
    pre, ft = peaked_logits(rows, vocabulary, device=DEVICE)
    labels = gold_labels(rows, vocabulary, DEVICE)
    out = torch.empty_like(ft)
    mus = torch.tensor([0.0, 0.5, 1.0, 2.0], device=DEVICE)
    benchmark.extra_info["minimum_bytes"] = 2 * ft.numel() * 4 + (ft.numel() * 4 if output == "dense" else 0)
    calls = {
        "dense": lambda: svdecode.fused_steer(pre, ft, 0.5, out=out),
        "scalars": lambda: svdecode.optimal_strength(pre, ft, labels),
        "greedy": lambda: svdecode.steer_sample(pre, ft, 0.5, temperature=0.0),
        "topk": lambda: svdecode.steer_topk(pre, ft, 0.5, k=8),
        "sampled": lambda: svdecode.steer_sample(pre, ft, 0.5, top_k=50, top_p=0.9),
        "nll": lambda: svdecode.steered_nll(pre, ft, labels, mus),
    }
    timed(benchmark, calls[output])
