"""Times of a GPU: of single calls, of replayed graphs, and the bandwidths that they are held against.

On a CPU the same functions time the calls as they are, so that every script can be tried without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from svdecode.common.timing import quartiles, seconds_of

HEAD_START = 2_000_000
"""Cycles, about a millisecond, that the GPU waits before the first event: the call is then queued when its turn comes, and the
time between the events is the GPU's alone, without the Python of the call."""
WARM_CLOCKS = 0.5
"""Seconds of copying before anything is timed: an idle card runs at a fraction of its clock."""
COPY_BYTES = {"cuda": 1 << 30, "cpu": 200_000_000}


def device_seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that the device takes for a call, without the time in which Python prepares it."""
    if device != "cuda":
        return seconds_of(call, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def bandwidths(device: str, size: int | None = None, rounds: int = 15) -> dict[str, dict]:
    """Bytes a second of a large copy (read and written bytes counted) and of a read-only reduction, the faster of two.

    Returns:
        {"copy" or "read": {"bytes_per_second": median, "quartiles": [low, high], "call": what was timed}}
    """
    size = size or COPY_BYTES[device]
    source, target = (torch.zeros(size // 4, dtype=torch.float32, device=device) for _ in range(2))
    if device == "cuda":
        begin = time.perf_counter()
        while time.perf_counter() - begin < WARM_CLOCKS:
            target.copy_(source)
            torch.cuda.synchronize()
    moved = source.nbytes
    candidates = {
        "copy": {"copy_": (lambda: target.copy_(source), 2 * moved)},
        "read": {
            "sum": (lambda: source.sum(), moved),
            "dot": (lambda: torch.dot(source, target), 2 * moved),
        },
    }
    found = {}
    for name, calls in candidates.items():
        for label, (call, count) in calls.items():
            times = [device_seconds(call, device) for _ in range(rounds)][2:]
            slow, middle, fast = quartiles([count / spent for spent in times])
            if name not in found or middle > found[name]["bytes_per_second"]:
                found[name] = {"bytes_per_second": middle, "quartiles": [slow, fast], "call": label}
    return found


def replay_of(call: Callable, pairs: Sequence[tuple[Tensor, Tensor]], device: str) -> Callable[[], object]:
    """One captured graph of a call on each pair in turn: together the pairs are larger than the L2 cache.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    if device != "cuda":

        def calls() -> None:
            for pair in pairs:
                call(*pair)

        return calls
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for pair in pairs[:3]:  # what is compiled or chosen at first use cannot be captured
            call(*pair)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pair in pairs:
            call(*pair)
    return graph.replay


def extra_bytes(call: Callable[[], object]) -> int:
    """Bytes of GPU memory that a call needs at its peak, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
