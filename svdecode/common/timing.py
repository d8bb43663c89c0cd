"""Times of several variants that take turns, so that all of them meet the same machine; medians and quartiles."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def seconds_of(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, with the release of its result; on a GPU between two CUDA events."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(
    calls: dict[Any, Callable],
    arguments: Sequence[tuple] = ((),),
    *,
    device: str = "cpu",
    warm_up: int = 2,
    rounds: tuple[int, int] = (5, 200),
    seconds: float = 1.0,
    failed: dict[Any, str] | None = None,
    title: str | None = None,
    clock: Callable[[Callable[[], object], str], float] = seconds_of,
) -> dict[Any, list[float]]:
    """Time each call once per round.

    Args:
        calls: the variants by name, or by any other key.
        arguments: what the calls get. A variant gets arguments that no other variant has just used, where there are several.
        device: "cpu" or "cuda".
        warm_up: rounds at the beginning that are not timed.
        rounds: the least and the largest number of timed rounds.
        seconds: per variant; no further round begins after them, once the least number is done.
        failed: receives the error's name of each variant that raises one; such a variant is left out from then on. With
            None the error is raised.
        title: of a progress bar on stderr; None shows none.
        clock: measures the seconds of a call on a device.

    Returns:
        The seconds of each timed call, by variant; none for a variant that failed before.
    """
    found: dict[Any, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    turns = range(warm_up + rounds[1])
    if title is not None:
        from tqdm import tqdm  # not needed by torch alone

        turns = tqdm(turns, desc=title, unit="round")
    for turn in turns:
        if turn == warm_up:
            begin = time.perf_counter()
        if turn >= warm_up + rounds[0] and time.perf_counter() - begin > seconds * len(calls):
            break
        for place, (name, call) in enumerate(calls.items()):
            if failed is not None and name in failed:
                continue
            chosen = arguments[(turn * len(calls) + place) % len(arguments)]
            try:
                spent = clock(lambda call=call, chosen=chosen: call(*chosen), device)
            except RuntimeError as error:  # torch's lack of memory among them
                if failed is None:
                    raise
                failed[name] = type(error).__name__
                continue
            if turn >= warm_up:
                found[name].append(spent)
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value that value."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return low, middle, high


def microseconds(times: dict[str, list[float]]) -> dict[str, dict]:
    """Medians and quartiles of seconds, as result files have them: {"us": by name, "quartiles_us": by name}."""
    found = {name: [1e6 * value for value in quartiles(values)] for name, values in times.items() if values}
    return {
        "us": {name: median for name, (_, median, _) in found.items()},
        "quartiles_us": {name: [low, high] for name, (low, _, high) in found.items()},
    }


def processor_name(device: str = "cpu") -> str:
    """The name of the GPU on "cuda", else of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
