"""The time that Python takes for one call of each operator with the Triton kernels, in microseconds.

    python bench/overhead.py [--json] [--rows 1] [--vocabulary 4096]

Without a GPU a stub driver compiles the kernels for sm_90 and starts nothing, and the tensors lie in the host's memory. With a
GPU the calls are timed without waiting for it. All operators take turns. A turn is a few calls one after another, and its time
is divided by their number; the least time of a turn is what other processes on the machine disturbed least.

    torch.empty    the yardstick: a small tensor, which costs about 1.1 us on an idle machine
    triton         without `kernels/launch.py`: each launch is prepared by Triton
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

os.environ.pop("TRITON_INTERPRET", None)  # kernels decorated under it have no launcher
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what the kernels run with; unset, triton 3.9 warns

import torch
import triton
from stub_driver import StubDriver

import svdecode
from svdecode.common.tables import markdown_table
from svdecode.common.timing import processor_name
from svdecode.kernels import launch
from svdecode.ops import backends

YARDSTICK = "torch.empty"
CALLS = 10
"""In a turn, which thus lasts about a millisecond: short enough to fall between two interruptions."""


@contextlib.contextmanager
def launches_by_triton() -> Iterator[None]:
    """Every launch is prepared by Triton, as where a hook looks on."""
    before, launch._is_watched = launch._is_watched, lambda _kernel: True
    try:
        yield
    finally:
        launch._is_watched = before


@contextlib.contextmanager
def without_gpu() -> Iterator[StubDriver]:
    """Calls on CPU tensors reach the Triton kernels, which are compiled and start nothing."""
    driver, interpreted = StubDriver(), backends.triton_is_interpreted
    triton.runtime.driver.set_active(driver)
    backends.triton_is_interpreted = lambda: True
    try:
        with svdecode.use_backend("triton"):
            yield driver
    finally:
        backends.triton_is_interpreted = interpreted


def operators(rows: int, vocabulary: int, device: str) -> dict[str, Callable[[], object]]:
    """A call of each operator, by name."""
    pre, ft = (torch.randn(rows, vocabulary, device=device).bfloat16() for _ in range(2))
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    strengths = torch.linspace(0.0, 1.0, 4, device=device)
    sampling = dict(temperature=0.8, top_k=20, top_p=0.9)
    return {
        "fused_steer": lambda: svdecode.fused_steer(pre, ft, 0.5),
        "fused_steer, labels": lambda: svdecode.fused_steer(pre, ft, labels=labels),
        "steer_sample, greedy": lambda: svdecode.steer_sample(pre, ft, 0.5, temperature=0.0),
        "steer_sample": lambda: svdecode.steer_sample(pre, ft, 0.5, **sampling),
        "steer_topk": lambda: svdecode.steer_topk(pre, ft, 0.5, k=8),
        "steered_nll": lambda: svdecode.steered_nll(pre, ft, labels, strengths),
        "optimal_strength": lambda: svdecode.optimal_strength(pre, ft, labels),
        "steering_vector": lambda: svdecode.steering_vector(pre, ft),
    }


def through_triton(call: Callable[[], object]) -> Callable[[], None]:
    """The same call with every launch prepared by Triton."""

    def by_triton() -> None:
        with launches_by_triton():
            call()

    return by_triton


def calls(rows: int, vocabulary: int, device: str) -> dict[str, Callable[[], object]]:
    """What takes turns: the yardstick, the operators, and two of them through Triton's own launches."""
    found = operators(rows, vocabulary, device)
    yardstick = {YARDSTICK: lambda: torch.empty((1, 64), dtype=torch.float32, device=device)}
    by_triton = {f"{name}, triton": through_triton(found[name]) for name in ("fused_steer", "steer_sample, greedy")}
    return yardstick | found | by_triton


def measure(timed: dict[str, Callable[[], object]], turns: int, device: str = "cpu") -> dict[str, list[float]]:
    """Microseconds of a call in each turn, by name."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for call in timed.values():  # compiles
        call()
    gc.collect()
    gc.disable()  # a collection would fall on one of the operators
    try:
        for _ in range(turns):
            for name, call in timed.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                found[name].append((time.perf_counter() - start) / CALLS * 1e6)
                if device == "cuda":  # a full queue would make the host wait
                    torch.cuda.synchronize()
    finally:
        gc.enable()
    return found


def figures(rows: int, vocabulary: int, turns: int) -> dict:
    """What `--json` prints: the machine, the versions, and least and median microseconds by name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.nullcontext() if device == "cuda" else without_gpu(), torch.no_grad():
        times = measure(calls(rows, vocabulary, device), turns, device)
    return {
        "processor": processor_name(),
        "gpu": processor_name("cuda") if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": rows,
        "vocabulary": vocabulary,
        "us": {name: {"least": min(us), "median": statistics.median(us)} for name, us in times.items()},
    }


def table(found: dict) -> str:
    """The figures for people."""
    of_yardstick = found["us"][YARDSTICK]["least"]
    rows = [
        (name, f"{us['least']:.1f}", f"{us['median']:.1f}", f"{us['least'] / of_yardstick:.1f}")
        for name, us in found["us"].items()
    ]
    where = found["gpu"] or "a stub driver, no GPU"
    head = f"{found['processor']}, {where}; torch {found['torch']}, triton {found['triton']}\n\n"
    return head + markdown_table(("call", "least, us", "median, us", f"least / {YARDSTICK}"), rows)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rows", type=int, default=1, help="rows of the logits (1)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of a row (4096)")
    parser.add_argument("--turns", type=int, default=200, help=f"turns of {CALLS} calls of each operator (200)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = figures(options.rows, options.vocabulary, options.turns)
    print(json.dumps(found, indent=1) if options.json else table(found))


if __name__ == "__main__":
    main()
