"""Time the operators against eager PyTorch, torch.compile and the copy bandwidth of the machine, in one run.

    python bench/operators.py [--device cuda|cpu] [--rows ...] [--vocabularies ...] [--budget SECONDS] [--output FILE]

Every variant computes the same outputs; variants take turns within each round, so that all meet the same machine; medians
over the rounds. Inputs rotate through more memory than the last-level cache holds. The bound is the minimum traffic (both
inputs read, the output written once) over the bandwidth of a copy measured in the same run. On a GPU times are from CUDA
events, and from the replay of a captured graph where there are few rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import svdecode
from svdecode.ops import reference

CACHE_BYTES = {"cuda": 200e6, "cpu": 100e6}
GRAPH_ROWS = 64
ROUNDS = {"cuda": 30, "cpu": 7}
MU = 0.5
CUDA_CPP = torch.cuda.is_available() and bool(svdecode.backends()["cuda"])


def dense_reference(pre: Tensor, ft: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and KL in plain PyTorch."""
    out = reference.fused_steer(pre, ft, ft.new_tensor(MU), None, 0.1, -math.inf, "kl", 1e-12, True)
    return out[0], out[3]


def scalars_reference(pre: Tensor, ft: Tensor, labels: Tensor) -> Tensor:
    """Moments in plain PyTorch."""
    return reference.optimal_strength(pre, ft, labels, 0.1, "kl", 1e-12)[1]


def greedy_reference(pre: Tensor, ft: Tensor) -> Tensor:
    """The most probable steered token in plain PyTorch."""
    return dense_reference(pre, ft)[0].argmax(-1)


def variants(output: str, out: Tensor, labels: Tensor, compiled: dict[str, Callable]) -> dict[str, Callable]:
    """What is timed for one kind of output."""
    if output == "dense":
        return {
            "svdecode": lambda a, z: svdecode.fused_steer(a, z, MU, out=out),
            **({"cuda c++": lambda a, z: svdecode.fused_steer(a, z, MU, out=out, backend="cuda")} if CUDA_CPP else {}),
            "eager": dense_reference,
            "compiled": compiled["dense"],
        }
    if output == "scalars":
        return {
            "svdecode": lambda a, z: svdecode.optimal_strength(a, z, labels),
            "eager": lambda a, z: scalars_reference(a, z, labels),
            "compiled": lambda a, z: compiled["scalars"](a, z, labels),
        }
    return {
        "svdecode": lambda a, z: svdecode.steer_sample(a, z, MU, temperature=0.0),
        "eager": greedy_reference,
        "compiled": compiled["greedy"],
    }


def seconds_of(call: Callable, inputs: tuple[Tensor, Tensor], device: str) -> float:
    """One timed call."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*inputs)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call(*inputs)
    return time.perf_counter() - begin


def graph_seconds(call: Callable, inputs: tuple[Tensor, Tensor], replays: int = 200) -> float:
    """Seconds a replay of the captured call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call(*inputs)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*inputs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / replays


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy, read and write counted."""
    size = int(1e9 if device == "cuda" else 2e8)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    source.zero_()
    times = [seconds_of(lambda a, b: b.copy_(a), (source, target), device) for _ in range(12)]
    return 2 * size / statistics.median(times[2:])


def logits(rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor]]:
    """Pairs of peaked logits, as many as it takes to outgrow the cache."""
    size = 2 * rows * vocabulary * torch.finfo(dtype).bits // 8
    pairs = []
    for seed in range(max(2, math.ceil(2 * CACHE_BYTES[device] / size)) if size < CACHE_BYTES[device] else 2):
        generator = torch.Generator(device).manual_seed(seed % 4)
        ft = torch.empty(rows, vocabulary, dtype=dtype, device=device).normal_(generator=generator)
        ft[:, vocabulary // 3] = 15.0
        ft[:, vocabulary // 2] = 14.5
        pairs.append((ft + 0.25, ft))
        if len(pairs) == 64:
            break
    return pairs


def measure(
    device: str, rows: int, vocabulary: int, dtype: torch.dtype, bandwidth: float, compiled: dict
) -> list[dict]:
    """All outputs at one shape."""
    pairs = logits(rows, vocabulary, dtype, device)
    out = torch.empty(rows, vocabulary, dtype=torch.float32, device=device)
    labels = torch.full((rows,), vocabulary // 3, device=device)
    read = 2 * rows * vocabulary * torch.finfo(dtype).bits // 8
    results = []
    for output in ("dense", "scalars", "greedy"):
        found = variants(output, out, labels, compiled)
        times: dict[str, list[float]] = {name: [] for name in found}
        failed: dict[str, str] = {}
        for turn in range(ROUNDS[device] + 2):
            for name, call in found.items():
                if name in failed:
                    continue
                try:
                    seconds = seconds_of(call, pairs[turn % len(pairs)], device)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    failed[name] = type(error).__name__
                    continue
                if turn >= 2:
                    times[name].append(seconds)
        minimum = read + (4 * rows * vocabulary if output == "dense" else 0)
        row = {
            "output": output,
            "rows": rows,
            "vocabulary": vocabulary,
            "dtype": str(dtype).removeprefix("torch."),
            "minimum_bytes": minimum,
            "bound_us": 1e6 * minimum / bandwidth,
            "us": {name: 1e6 * statistics.median(t) for name, t in times.items() if t},
            "spread_us": {name: [1e6 * min(t), 1e6 * max(t)] for name, t in times.items() if t},
            "failed": failed,
        }
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found["svdecode"](*pairs[0])
            row["extra_bytes_a_row"] = (torch.cuda.max_memory_allocated() - before) / rows
            if rows <= GRAPH_ROWS:
                row["graph_us"] = 1e6 * graph_seconds(found["svdecode"], pairs[0])
        results.append(row)
    return results


def main() -> None:
    """Measure, print a line a shape on stderr, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("--vocabularies", type=int, nargs="*")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which no further shape is begun")
    parser.add_argument("--output", type=Path, help="JSON goes here instead of stdout")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    rows = arguments.rows or ([1, 8, 64, 512, 8192] if cuda else [1, 8])
    vocabularies = arguments.vocabularies or ([128256, 151936, 32000, 262144] if cuda else [49152])
    mode = {"mode": "max-autotune-no-cudagraphs"} if cuda else {}
    begin = time.monotonic()
    bandwidth = copy_bandwidth(arguments.device)
    results: list[dict] = []
    skipped = []
    for vocabulary in vocabularies:
        torch._dynamo.reset()
        plain = {"dense": dense_reference, "scalars": scalars_reference, "greedy": greedy_reference}
        compiled = {name: torch.compile(function, dynamic=True, **mode) for name, function in plain.items()}
        for count in rows:
            if time.monotonic() - begin > arguments.budget:
                skipped.append([count, vocabulary])
                continue
            dtype = getattr(torch, arguments.dtype)
            for row in measure(arguments.device, count, vocabulary, dtype, bandwidth, compiled):
                results.append(row)
                times = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
                share = row["bound_us"] / row["us"]["svdecode"]
                print(f"{count} x {vocabulary} {row['output']}: {times} us; {share:.0%} of the bound", file=sys.stderr)
    report = {
        "card": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "backends": {name: found._asdict() for name, found in svdecode.backends().items()},
        "copy_bandwidth": bandwidth,
        "results": results,
        "skipped": skipped,
    }
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
