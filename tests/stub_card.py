"""A card made of stubs: code that asks torch.cuda runs on the CPU, and what it asks of the card is counted.

It shows that every line of such code runs, not that it measures anything.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # imported later, while the stub stands, it would ask the stub
from torch.overrides import TorchFunctionMode

NAME = "Stub Card 9000"
L2_BYTES = 1_000_000
SLOWDOWN = 1e3
"""Milliseconds that the stub's events count for a second."""


class OnTheCpu(TorchFunctionMode):
    """Makes tensors that are asked for on "cuda" on the CPU."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if str(keywords.get("device", "")).startswith("cuda"):
            keywords["device"] = "cpu"
        return function(*arguments, **keywords)


@contextlib.contextmanager
def stub_card(capturable=lambda: True):
    """torch as if there were a card.

    Args:
        capturable: asked at each capture; where it says no, the capture raises, as torch does.

    Yields:
        A Counter of what was asked for: "sleep", "record", "capture", "replay", "synchronize".
    """
    asked: Counter = Counter()

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            asked["record"] += 1
            self.time = time.perf_counter()

        def synchronize(self):
            asked["synchronize"] += 1

        def elapsed_time(self, other):
            return (other.time - self.time) * SLOWDOWN

    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    class Graph:
        calls = 0

        def replay(self):
            asked["replay"] += 1

    @contextlib.contextmanager
    def capturing(graph):
        assert isinstance(graph, Graph)
        asked["capture"] += 1
        if not capturable():
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    stubs = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=L2_BYTES
        ),
        "synchronize": lambda *_: asked.update(["synchronize"]),
        "_sleep": lambda cycles: asked.update(["sleep"]),
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capturing,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 4096,
    }
    with pytest.MonkeyPatch.context() as patch, OnTheCpu():
        for name, stub in stubs.items():
            patch.setattr(torch.cuda, name, stub)
        patch.setattr(torch, "Generator", Generator)
        yield asked
