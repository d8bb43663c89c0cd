"""Time the C++ operators on a CPU against eager PyTorch, torch.compile and the memory, in one process.

    python bench/cpu.py --threads 1 [--rows ...] [--vocabularies ...] [--output FILE]

For each shape all variants take turns, on inputs that rotate through more memory than the caches hold, writing into outputs
that are made once; medians over the rounds. The rivals are the method's formulas without the handling of infinities and NaN.

    all        log-probs, KL and the moments of a label             greedy    the most probable steered token
    logprobs   log-probs alone (return_kl=False, no labels)         bound     torch.add of both inputs into the output's memory

One process times one number of threads: torch.compile fixes it when it compiles.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import svdecode

ROTATED_BYTES = 100e6
SECONDS = 1.0  # a variant's share of a shape
ROUNDS = (5, 200)
ALPHA, MU = 0.1, 0.5


def rival_logprobs(a: Tensor, z: Tensor) -> Tensor:
    """Steered log-probs, nothing more."""
    a, z = a.float(), z.float()
    p = torch.softmax(z, -1)
    d = z - a
    delta = p * (d - (p * d).sum(-1, keepdim=True))
    kept = z >= z.amax(-1, keepdim=True) + math.log(ALPHA)
    return torch.log_softmax(torch.where(kept, z + MU * delta, -math.inf), -1)


def rival_all(a: Tensor, z: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Steered log-probs, KL and the moments N, D, H."""
    a, z = a.float(), z.float()
    p = torch.softmax(z, -1)
    d = z - a
    mean_d = (p * d).sum(-1, keepdim=True)
    delta = p * (d - mean_d)
    kept = z >= z.amax(-1, keepdim=True) + math.log(ALPHA)
    logprobs = torch.log_softmax(torch.where(kept, z + MU * delta, -math.inf), -1)
    kl = mean_d.squeeze(-1) - torch.logsumexp(z, -1) + torch.logsumexp(a, -1)
    masked = torch.where(kept, delta, 0.0)
    mean = (p * masked).sum(-1)
    n = masked.gather(-1, labels[:, None]).squeeze(-1) - mean
    return logprobs, kl, n, masked.square().sum(-1), (p * masked.square()).sum(-1) - mean.square()


def rival_greedy(a: Tensor, z: Tensor) -> Tensor:
    """The token."""
    return rival_logprobs(a, z).argmax(-1)


def inputs(rows: int, vocabulary: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Pairs of peaked logits, together larger than the caches."""
    count = max(4, math.ceil(ROTATED_BYTES / (2 * rows * vocabulary * dtype.itemsize)))
    pairs = []
    for seed in range(min(count, 128)):
        generator = torch.Generator().manual_seed(seed % 4)
        ft = torch.empty(rows, vocabulary).normal_(generator=generator)
        ft[:, vocabulary // 3], ft[:, vocabulary // 2] = 15.0, 14.5
        pre = ft + 0.2 * torch.empty(rows, vocabulary).normal_(generator=generator)
        pairs.append((pre.to(dtype), ft.to(dtype)))
    return pairs


def variants(rows: int, vocabulary: int) -> dict[str, dict[str, object]]:
    """What is timed, by output and name."""
    torch._dynamo.reset()
    out = torch.empty(rows, vocabulary)
    labels = torch.full((rows,), vocabulary // 3)
    compiled = {f.__name__: torch.compile(f) for f in (rival_all, rival_logprobs, rival_greedy)}
    return {
        "all": {
            "svdecode": lambda a, z: svdecode.fused_steer(a, z, MU, labels=labels, out=out),
            "eager": lambda a, z: rival_all(a, z, labels),
            "compiled": lambda a, z: compiled["rival_all"](a, z, labels),
        },
        "logprobs": {
            "svdecode": lambda a, z: svdecode.fused_steer(a, z, MU, return_kl=False, out=out),
            "eager": rival_logprobs,
            "compiled": compiled["rival_logprobs"],
            "bound": lambda a, z: torch.add(a, z, out=out),
        },
        "greedy": {
            "svdecode": lambda a, z: svdecode.steer_sample(a, z, MU, temperature=0.0),
            "eager": rival_greedy,
            "compiled": compiled["rival_greedy"],
        },
    }


def timed(calls: dict[str, object], pairs: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """Microseconds of every round of every variant, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(ROUNDS[1] + 2):
        for place, (name, call) in enumerate(calls.items()):
            pair = pairs[(turn * len(calls) + place) % len(pairs)]  # one that no other variant has just read
            start = time.perf_counter()
            call(*pair)
            times[name].append(1e6 * (time.perf_counter() - start))
        if turn == 1:  # compiled and warm
            begin = time.perf_counter()
        if turn >= ROUNDS[0] + 2 and time.perf_counter() - begin > SECONDS * len(calls):
            break
    return {name: found[2:] for name, found in times.items()}


def measure(rows: int, vocabulary: int, dtype: torch.dtype) -> list[dict]:
    """All outputs at one shape."""
    pairs = inputs(rows, vocabulary, dtype)
    results = []
    for output, calls in variants(rows, vocabulary).items():
        times = timed(calls, pairs)
        results.append(
            {
                "output": output,
                "rows": rows,
                "vocabulary": vocabulary,
                "dtype": str(dtype).removeprefix("torch."),
                "rounds": len(times["svdecode"]),
                "us": {name: statistics.median(t) for name, t in times.items()},
                "quartiles_us": {name: statistics.quantiles(t, n=4)[::2] for name, t in times.items()},
            }
        )
    return results


def call_overhead() -> dict[str, float]:
    """Microseconds of one call at V = 64, the best of many: through the Python wrapper, and torch.ops directly."""
    from svdecode.ops import compiled

    a, z = torch.randn(1, 64), torch.randn(1, 64)
    numbers = compiled._numbers(ALPHA, -math.inf, 1e-12, "kl", MU, compiled.DENSE | compiled.RETURN_KL)
    direct = torch.ops.svdecode_compiled.fused_steer.default
    calls = {
        "wrapper": lambda: svdecode.fused_steer(a, z, MU),
        "torch.ops": lambda: direct(a, z, numbers),
        "torch.empty(1)": lambda: torch.empty(1),
    }
    best = dict.fromkeys(calls, math.inf)
    for _ in range(30):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(1000):
                call()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def table(report: dict) -> str:
    """Markdown: times faster than the rivals, share of the bound."""
    lines = [
        ", ".join(
            [report["cpu"], report["instruction_set"], f"{report['threads']} thread(s)", f"torch {report['torch']}"]
        ),
        "",
        "| rows x V | dtype | all us | x compile | x eager | logprobs us "
        "| x compile | x eager | of bound | greedy us | dense / greedy |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    shapes: dict[tuple, dict[str, dict]] = {}
    for row in report["results"]:
        shapes.setdefault((row["rows"], row["vocabulary"], row["dtype"]), {})[row["output"]] = row["us"]
    for (rows, vocabulary, dtype), found in shapes.items():
        cells = [f"{rows} x {vocabulary}", dtype]
        for output in ("all", "logprobs"):
            us = found[output]
            cells += [
                f"{us['svdecode']:.0f}",
                f"{us['compiled'] / us['svdecode']:.1f}",
                f"{us['eager'] / us['svdecode']:.1f}",
            ]
        dense = found["logprobs"]
        cells.append(f"{dense['bound'] / dense['svdecode']:.0%}")
        cells += [f"{found['greedy']['svdecode']:.0f}", f"{dense['svdecode'] / found['greedy']['svdecode']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    overhead = ", ".join(f"{name} {us:.1f} us" for name, us in report["call_overhead_us"].items())
    return "\n".join([*lines, "", f"One call at V = 64: {overhead}."])


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[49_152, 151_936])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="JSON goes here")
    arguments = parser.parse_args()
    found = svdecode.backends()["cpu"]
    if not found:
        parser.error(f"the C++ operators are not here: {found.reason}")
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    cpu = subprocess.run(
        ["sh", "-c", "lscpu | grep 'Model name' | cut -d: -f2"], capture_output=True, text=True
    ).stdout.strip()
    report = {
        "cpu": cpu,
        "instruction_set": found.reason,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "call_overhead_us": call_overhead(),
        "results": [],
    }
    for vocabulary in arguments.vocabularies:
        for rows in arguments.rows:
            for dtype in arguments.dtypes:
                report["results"] += measure(rows, vocabulary, getattr(torch, dtype))
                print(f"{rows} x {vocabulary} {dtype} done", file=sys.stderr)
    print(table(report))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
