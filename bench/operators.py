"""Time the operators against eager PyTorch, torch.compile and the memory's bandwidth, in one run.

    python bench/operators.py [--device cuda|cpu] [--rows ...] [--vocabularies ...] [--budget SECONDS] [--output FILE]
    python bench/operators.py --replay ...          # the same calls as captured graphs, on a GPU

For each shape all variants take turns, so that all meet the same machine; medians and quartiles over the rounds. All read
inputs that rotate through more memory than the caches hold, also in a graph, and write log-probs into one buffer that is
reused. The rivals compute the same outputs (`bench/rivals.py`). The bound is the least traffic (both inputs read, log-probs
written once) over the bandwidth of a copy in the same process. On a GPU the time is the GPU's alone; `bench/python_calls.py`
has Python's.

The file is written after every output and shape. With --resume only what it lacks is measured. Exit status: 1 where a variant
of svdecode failed, 75 where the budget ended before the last shape.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rivals
import torch
from device_timing import bandwidths, device_seconds, extra_bytes, replay_of
from inputs import gold_labels, rotation
from torch import Tensor

import svdecode
from svdecode.common.files import to_json, write_atomically
from svdecode.common.timing import in_turns, microseconds, processor_name

RIVALS = ("eager", "compiled")
MU = rivals.MU
OUTPUTS = ("dense", "greedy", "scalars", "sampled", "topk", "nll")
"""Log-probs and KL; the most probable token; the best strength and its moments; a draw; the 8 best; four strengths' NLL."""
ROUNDS = {"cuda": 30, "cpu": 7}
UNFINISHED = 75
"""Exit status: there was no time for all; the same command with --resume goes on."""
REPLAY_ROWS = 64
"""Graphs matter where a call is short."""

# The first are those of the targets (`bench/targets.py`).
SHAPES = {
    "cuda": [
        *((rows, vocabulary, "bfloat16") for rows, vocabulary in [
            (512, 128256), (1, 151936), (8192, 128256), (1, 128256), (8, 128256), (64, 128256), (8, 151936), (512, 151936),
            (1, 32000), (512, 32000), (512, 50257), (1, 262144), (64, 262144), (64, 32000), (64, 151936), (8192, 32000),
        ]),
        *((rows, 128256, dtype) for dtype in ("float32", "float16") for rows in (512, 1)),
    ],
    "cpu": [(1, 49152, "bfloat16"), (8, 49152, "bfloat16")],
}  # fmt: skip


def our_backends(device: str) -> list[str]:
    """Those of svdecode that run on the device; on a CPU also Triton where it is interpreted (TRITON_INTERPRET=1)."""
    here = svdecode.backends()
    if device == "cuda":
        return [name for name in ("triton", "cuda") if here[name]]
    return ["cpu" if here["cpu"] else "reference", *(["triton"] if here["triton"] else [])]


def our_calls(backend: str, out: Tensor, labels: Tensor, strengths: Tensor) -> dict[str, Callable]:
    """The operators by output; each takes both inputs."""
    return {
        "dense": lambda a, z: svdecode.fused_steer(a, z, MU, out=out, backend=backend),
        "greedy": lambda a, z: svdecode.steer_sample(a, z, MU, temperature=0.0, backend=backend),
        "scalars": lambda a, z: svdecode.optimal_strength(a, z, labels, backend=backend),
        "sampled": lambda a, z: svdecode.steer_sample(a, z, MU, top_k=50, top_p=0.9, backend=backend),
        "topk": lambda a, z: svdecode.steer_topk(a, z, MU, k=8, backend=backend),
        "nll": lambda a, z: svdecode.steered_nll(a, z, labels, strengths, backend=backend),
    }


def rival_calls(output: str, wanted: list[str], out: Tensor, labels: Tensor, device: str) -> dict[str, Callable]:
    """Eager PyTorch and torch.compile, which get the same buffer; none for outputs that have no short formula."""
    found: dict[str, Callable] = {}
    if output not in rivals.FORMULAS:
        return found
    eager, compilable = rivals.FORMULAS[output]
    more = {"dense": (out,), "scalars": (labels,), "greedy": ()}[output]
    if "eager" in wanted:
        found["eager"] = lambda a, z: eager(a, z, *more)
    if "compiled" in wanted:
        torch._dynamo.reset()
        compiled = rivals.compiled(compilable, device)
        found["compiled"] = lambda a, z: compiled(a, z, *more)
    return found


def timed(
    calls: dict[str, Callable], pairs: list, options: argparse.Namespace, failed: dict[str, str]
) -> dict[str, list]:
    """Seconds of a call, by variant: one at a time, or as a share of a replayed graph."""
    device = options.device
    rounds = (options.rounds or ROUNDS[device],) * 2
    if not options.replay:
        return in_turns(calls, pairs, device=device, rounds=rounds, failed=failed, clock=device_seconds)
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = replay_of(call, pairs, device)
        except RuntimeError as error:  # such a variant cannot be captured; the others go on
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    times = in_turns(graphs, device=device, rounds=rounds, failed=failed, clock=device_seconds)
    return {name: [spent / len(pairs) for spent in found] for name, found in times.items()}


def measure(output: str, shape: tuple[int, int, str], bandwidth: float, options: argparse.Namespace) -> dict:
    """The row of one output at one shape."""
    rows, vocabulary, dtype = shape
    device = options.device
    pairs = rotation(rows, vocabulary, getattr(torch, dtype), device)[: options.pairs]
    out = torch.empty(rows, vocabulary, dtype=torch.float32, device=device)
    labels = gold_labels(rows, vocabulary, device)
    strengths = torch.tensor([0.0, 0.5, 1.0, 2.0], device=device)
    calls = {name: our_calls(name, out, labels, strengths)[output] for name in our_backends(device)}
    ours = list(calls)
    calls |= rival_calls(output, options.rivals, out, labels, device)
    one = pairs[0][0].nbytes
    moved = 2 * one + (out.nbytes if output == "dense" else 0)
    minimum = dict.fromkeys(calls, moved)
    if output == "dense" and device == "cuda" and options.rivals:
        for name, (call, inputs) in rivals.yardsticks().items():
            calls[name], minimum[name] = call, inputs * one
    failed: dict[str, str] = {}
    times = timed(calls, pairs, options, failed)
    row = {
        "output": output,
        "rows": rows,
        "vocabulary": vocabulary,
        "dtype": dtype,
        "replay": options.replay,
        "pairs": len(pairs),
        "ours": ours,
        "minimum_bytes": minimum,
        "copy_bandwidth": bandwidth,
        "bound_us": 1e6 * moved / bandwidth,
        **microseconds(times),
        "failed": failed,
    }
    working = [name for name in ours if name not in failed]
    if device == "cuda" and not options.replay and working:
        row["extra_bytes_per_row"] = extra_bytes(lambda: calls[working[0]](*pairs[0])) / rows
    return row


def key(row: dict) -> tuple:
    """What a row is about."""
    return row["output"], row["rows"], row["vocabulary"], row["dtype"], row["replay"]


def begun(path: Path | None, resume: bool) -> list[dict]:
    """The rows of an earlier run, those left out in which svdecode failed."""
    if not (resume and path and path.is_file()):
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    return [row for row in rows if not set(row["failed"]) & set(row["ours"])]


def line(row: dict) -> str:
    """A row for a person who looks on."""
    times = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
    wrong = "".join(f"; {name}: {error}" for name, error in row["failed"].items())
    return f"{row['rows']} x {row['vocabulary']} {row['dtype']} {row['output']}: bound {row['bound_us']:.1f}, {times} us{wrong}"


def main() -> int:
    """Measure, print a line per shape and output on stderr, and write JSON; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("--vocabularies", type=int, nargs="*")
    parser.add_argument("--dtype", default="bfloat16", help="of --rows and --vocabularies")
    parser.add_argument("--outputs", nargs="*", choices=OUTPUTS, default=OUTPUTS)
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    parser.add_argument("--replay", action="store_true", help="time captured graphs, of few rows")
    parser.add_argument("--rounds", type=int, help="each variant is timed so many times")
    parser.add_argument("--pairs", type=int, help="of inputs at most; left out, more than the caches hold")
    parser.add_argument("--copy-bytes", type=int, help="of the copy that gives the bandwidth")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which no further shape is begun")
    parser.add_argument("--output", type=Path, help="JSON goes here instead of stdout")
    parser.add_argument("--resume", action="store_true", help="measure only what the output file lacks")
    arguments = parser.parse_args()
    device, begin = arguments.device, time.monotonic()
    shapes = SHAPES[device]
    if arguments.rows or arguments.vocabularies:
        rows = arguments.rows or sorted({shape[0] for shape in shapes})
        vocabularies = arguments.vocabularies or sorted({shape[1] for shape in shapes})
        shapes = [(r, v, arguments.dtype) for v, r in itertools.product(vocabularies, rows)]
    shapes = [shape for shape in shapes if not arguments.replay or shape[0] <= REPLAY_ROWS]
    torch.set_grad_enabled(False)
    found = bandwidths(device, arguments.copy_bytes)
    report = {
        "card": processor_name(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "torch.compile": rivals.COMPILE_MODE[device] or "default",
        "backends": {name: backend._asdict() for name, backend in svdecode.backends().items()},
        "bandwidths": found,
        "results": begun(arguments.output, arguments.resume),
        "skipped": [],
    }
    have = {key(row) for row in report["results"]}
    wanted = [(output, shape) for shape in shapes for output in arguments.outputs]
    for output, shape in wanted:
        if (output, *shape, arguments.replay) in have:
            continue
        if time.monotonic() - begin > arguments.budget:
            report["skipped"].append([output, *shape])
            continue
        row = measure(output, shape, found["copy"]["bytes_per_second"], arguments)
        report["results"].append(row)
        print(line(row), file=sys.stderr)
        if arguments.output:  # a run that is stopped keeps what it has
            write_atomically(arguments.output, to_json(report, indent=1).encode())
    if arguments.output:
        write_atomically(arguments.output, to_json(report, indent=1).encode())
    else:
        print(to_json(report, indent=1))
    broken = [line(row) for row in report["results"] if set(row["failed"]) & set(row["ours"])]
    print("".join(f"FAILED {text}\n" for text in broken), end="", file=sys.stderr)
    return 1 if broken else UNFINISHED if report["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
