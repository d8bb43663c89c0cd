"""Time the operators against eager PyTorch, torch.compile and the copy bandwidth of the machine, in one run.

    python bench/operators.py [--device cuda|cpu] [--rows ...] [--vocabularies ...] [--budget SECONDS] [--output FILE]

Every variant computes the same outputs, and writes log-probs into one buffer that is reused. Variants take turns within each
round, so that all meet the same machine; medians over the rounds. Inputs rotate through more memory than the last-level cache
holds. The bound is the minimum traffic (both inputs read, the output written once) over the bandwidth of a copy measured in the
same run. On a GPU times are from CUDA events, and from the replay of a captured graph where there are few rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from inputs import gold_labels, rotation
from torch import Tensor

import svdecode
from svdecode.common.timing import in_turns, microseconds, processor_name, seconds_of
from svdecode.ops import reference

RIVALS = ("eager", "compiled")
OUTPUTS = ("dense", "scalars", "greedy")
GRAPH_ROWS = 64
ROUNDS = {"cuda": 30, "cpu": 7}
MU = 0.5
CUDA_CPP = torch.cuda.is_available() and bool(svdecode.backends()["cuda"])


def dense_reference(pre: Tensor, ft: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probs, in `out` where one is given, and KL in plain PyTorch."""
    found = reference.fused_steer(pre, ft, ft.new_tensor(MU), None, 0.1, -math.inf, "kl", 1e-12, True, out)
    return found[0], found[3]


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
            "eager": lambda a, z: dense_reference(a, z, out),
            "compiled": lambda a, z: compiled["dense"](a, z, out),
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
    times = [seconds_of(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * size / statistics.median(times[2:])


def measure(
    device: str, rows: int, vocabulary: int, dtype: torch.dtype, bandwidth: float, compiled: dict, rivals: list[str]
) -> list[dict]:
    """All outputs at one shape."""
    pairs = rotation(rows, vocabulary, dtype, device)
    out = torch.empty(rows, vocabulary, dtype=torch.float32, device=device)
    labels = gold_labels(rows, vocabulary, device)
    read = 2 * rows * vocabulary * dtype.itemsize
    results = []
    for output in OUTPUTS:
        found = variants(output, out, labels, compiled)
        found = {name: call for name, call in found.items() if name not in RIVALS or name in rivals}
        failed: dict[str, str] = {}
        times = in_turns(found, pairs, device=device, rounds=(ROUNDS[device],) * 2, failed=failed)
        minimum = read + (4 * rows * vocabulary if output == "dense" else 0)
        row = {
            "output": output,
            "rows": rows,
            "vocabulary": vocabulary,
            "dtype": str(dtype).removeprefix("torch."),
            "minimum_bytes": minimum,
            "bound_us": 1e6 * minimum / bandwidth,
            **microseconds(times),
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
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
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
            for row in measure(arguments.device, count, vocabulary, dtype, bandwidth, compiled, arguments.rivals):
                results.append(row)
                times = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
                share = row["bound_us"] / row["us"]["svdecode"]
                print(f"{count} x {vocabulary} {row['output']}: {times} us; {share:.0%} of the bound", file=sys.stderr)
    report = {
        "card": processor_name(arguments.device),
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
