"""The time that Python takes for one call of an operator, on one row: microseconds until the call returns.

    python bench/python_calls.py [--device cuda|cpu] [--output FILE]

On a GPU a call returns when its kernels are queued. A burst of calls is timed while the queue has room for all of them, and the
GPU is waited for between the bursts. Quartiles over the bursts; no gradients.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from inputs import gold_labels, peaked_logits
from operators import our_backends

import svdecode
from svdecode.common.files import to_json, write_atomically
from svdecode.common.timing import microseconds, processor_name

MU = 0.5
BURST = 100
"""Calls; with three launches each they are well below the 1024 launches that a queue holds."""
VOCABULARY = {"cuda": 128_256, "cpu": 64}
"""On a CPU the call computes before it returns, so the row is short."""


def calls(backend: str, device: str, vocabulary: int) -> dict[str, Callable]:
    """What is timed, by name."""
    pre, ft = peaked_logits(1, vocabulary, torch.bfloat16, device)
    labels = gold_labels(1, vocabulary, device)
    return {
        "fused_steer": lambda: svdecode.fused_steer(pre, ft, MU, backend=backend),
        "fused_steer, labels": lambda: svdecode.fused_steer(pre, ft, labels=labels, backend=backend),
        "steer_sample, greedy": lambda: svdecode.steer_sample(pre, ft, MU, temperature=0.0, backend=backend),
        "steer_sample, top_k and top_p": lambda: svdecode.steer_sample(
            pre, ft, MU, top_k=50, top_p=0.9, backend=backend
        ),
        "steer_topk": lambda: svdecode.steer_topk(pre, ft, MU, k=8, backend=backend),
    }


def bursts(call: Callable, device: str, burst: int, rounds: int) -> list[float]:
    """Seconds of Python per call, one number per burst."""
    found = []
    for turn in range(rounds + 2):  # two to warm up
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(burst):
            call()
        if turn >= 2:
            found.append((time.perf_counter() - begin) / burst)
    return found


def main() -> int:
    """Measure, print a line per call, and write JSON; the exit status, 1 where a call failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--burst", type=int, default=BURST)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_grad_enabled(False)
    times, failed = {}, {}
    for backend in our_backends(device):
        for name, call in calls(backend, device, VOCABULARY[device]).items():
            try:
                times[f"{backend}: {name}"] = bursts(call, device, arguments.burst, arguments.rounds)
            except RuntimeError as error:
                failed[f"{backend}: {name}"] = f"{type(error).__name__}: {error}".splitlines()[0]
    report = {
        "card": processor_name(device),
        "device": device,
        "vocabulary": VOCABULARY[device],
        **microseconds(times),
        "failed": failed,
    }
    if arguments.output:
        write_atomically(arguments.output, to_json(report, indent=1).encode())
    for name, us in report["us"].items():
        low, high = report["quartiles_us"][name]
        print(f"{name}: {us:.1f} us [{low:.1f}, {high:.1f}]")
    for name, error in failed.items():
        print(f"FAILED {name}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
