"""Compile the kernels in parallel before anything is timed, and say what the compiler made of them.

    python bench/compile_kernels.py [--device cuda|cpu] [--processes N] [--budget SECONDS] [--output FILE]

Triton compiles a kernel at its first launch, one after another. Here processes share that work: each runs one operator at one
of the shapes of `bench/operators.py`, and leaves the binary in Triton's cache on the disk. Then every variant of
`KERNEL_VARIANTS` is compiled for this card, for the registers and the spilled bytes (`bench/compile_report.py`).

Exit status: 1 where a kernel does not compile or run, 75 where the budget was over before all were compiled.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from inputs import gold_labels, peaked_logits
from operators import OUTPUTS, SHAPES, UNFINISHED, our_backends, our_calls

from svdecode.common.files import to_json, write_atomically

MOST_PROCESSES = 12
"""Each has its own context on the GPU, about half a gigabyte."""
DTYPES = "bf16", "bf16"
WARM_ROWS = 16
"""Rows that stand for all larger numbers: Triton compiles anew for a size of 1, and for one that 16 divides."""


def warm(job: tuple[str, str, int, int, str, str]) -> dict:
    """Run one operator once, which compiles what it launches."""
    backend, output, rows, vocabulary, dtype, device = job
    begin = time.monotonic()
    pre, ft = peaked_logits(rows, vocabulary, getattr(torch, dtype), device)
    out = torch.empty(rows, vocabulary, device=device)
    strengths = torch.tensor([0.0, 0.5, 1.0, 2.0], device=device)
    with torch.no_grad():
        our_calls(backend, out, gold_labels(rows, vocabulary, device), strengths)[output](pre, ft)
    if device == "cuda":
        torch.cuda.synchronize()
    return {"job": f"{backend} {output} {rows} x {vocabulary} {dtype}", "seconds": time.monotonic() - begin}


def warm_jobs(device: str, shapes: list[tuple[int, int, str]]) -> list[tuple]:
    """One per backend, output, vocabulary and dtype, for each kind of row count; those of the first shapes first."""
    jobs = [
        (backend, output, min(rows, WARM_ROWS), vocabulary, dtype, device)
        for rows, vocabulary, dtype in shapes
        for backend, output in itertools.product(our_backends(device), OUTPUTS)
    ]
    return list(dict.fromkeys(jobs))


def report(index: int, target: int) -> dict:
    """Registers, spills and loads of one variant of KERNEL_VARIANTS."""
    import compile_report  # unsets TRITON_INTERPRET, and needs triton

    begin = time.monotonic()
    found = compile_report.compile_one(compile_report.variants()[index], *DTYPES, target)
    return {**found, "seconds": time.monotonic() - begin}


def count_of_variants() -> int:
    """How many variants KERNEL_VARIANTS lists."""
    import compile_report

    return len(compile_report.variants())


def collect(pending: dict[Future, str], until: float, results: list, failed: dict[str, str]) -> bool:
    """Gather what is done in time; whether it was all."""
    while pending and (left := until - time.monotonic()) > 0:
        done, _ = wait(pending, timeout=left, return_when=FIRST_COMPLETED)
        for future in done:
            name = pending.pop(future)
            error = future.exception()
            if error is None:
                results.append(future.result())
            else:
                failed[name] = f"{type(error).__name__}: {error}"[:2000]
                print(f"FAILED {name}: {failed[name].splitlines()[0]}", file=sys.stderr, flush=True)
    return not pending


def main() -> int:
    """Compile all, and write what was found; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, MOST_PROCESSES))
    parser.add_argument("--budget", type=float, default=300.0)
    parser.add_argument("--most", type=int, help="so many of each kind, for a trial")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    begin = time.monotonic()
    until = begin + arguments.budget
    shapes = SHAPES[arguments.device]
    target = 90
    if arguments.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        target = 10 * major + minor
    jobs = warm_jobs(arguments.device, shapes)[: arguments.most]
    warmed: list[dict] = []
    reports: list[dict] = []
    failed: dict[str, str] = {}
    # A process that ran into an illegal address has no GPU any more: the pools of the two kinds are apart.
    pools = []
    context = multiprocessing.get_context("spawn")
    try:
        pools.append(ProcessPoolExecutor(arguments.processes, context))
        complete = collect({pools[0].submit(warm, job): f"{job}" for job in jobs}, until, warmed, failed)
        print(f"{len(warmed)} of {len(jobs)} calls ran, {time.monotonic() - begin:.0f} s", flush=True)
        if complete and importlib.util.find_spec("triton"):
            pools.append(ProcessPoolExecutor(arguments.processes, context))
            count = pools[1].submit(count_of_variants).result(timeout=max(until - time.monotonic(), 1))
            numbers = range(count)[: arguments.most]
            complete = collect(
                {pools[1].submit(report, n, target): f"variant {n}" for n in numbers}, until, reports, failed
            )
            print(
                f"{len(reports)} of {count} variants compiled for sm_{target}, {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    except TimeoutError:
        complete = False
    finally:
        for pool in pools:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
    reports.sort(key=lambda row: row["kernel"])
    found = {
        "device": arguments.device,
        "target": f"sm_{target}",
        "processes": arguments.processes,
        "seconds": time.monotonic() - begin,
        "warmed": warmed,
        "variants": reports,
        "spilled": [row["kernel"] for row in reports if row["spilled"]],
        "failed": failed,
        "complete": complete,
    }
    if arguments.output:
        write_atomically(arguments.output, to_json(found, indent=1).encode())
    else:
        print(json.dumps(found["variants"]))
    return 1 if failed else 0 if complete else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
