"""Which implementation computes an operator: `reference` everywhere, `cpu`, `triton` and `cuda` where they exist."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "SVDECODE_BACKEND"


class Backend(NamedTuple):
    """One row of `backends()`: whether the backend can run here, and what it runs on or why it is missing."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run as numpy on CPU tensors (TRITON_INTERPRET=1), as the tests do without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton(interpreted: bool) -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "the package triton is not installed")
    if interpreted:
        return Backend(True, "interpreted (TRITON_INTERPRET=1), for tests")
    if not torch.cuda.is_available():
        return Backend(False, "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels slowly on a CPU, for tests)")
    return Backend(True, torch.cuda.get_device_name())


def backends() -> dict[str, Backend]:
    """Every backend by name, with `.available` and `.reason`: what it runs on, or why it is not here.

    `reference` is plain PyTorch (any device, also float64), `triton` the fused Triton kernels, `cpu` and `cuda` the
    compiled C++ and CUDA C++ operators.
    """
    missing = "this version has no compiled operators yet"
    return {
        "reference": Backend(True, "plain PyTorch"),
        "cpu": Backend(False, missing),
        "triton": _triton(triton_is_interpreted()),
        "cuda": Backend(False, missing),
    }


@functools.cache
def implementation(name: str, operator: str) -> Callable:
    """The function that computes an operator on a backend; its module is imported on first use."""
    if name == "triton":
        return getattr(importlib.import_module("svdecode.kernels"), operator)
    part = "reference_backward" if operator.endswith("_backward") else "reference"
    return getattr(importlib.import_module(f"svdecode.{part}"), operator)


def choose(backend: object, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """The backend to use: the argument, else SVDECODE_BACKEND, else by device; float64 is for the reference alone."""
    has_float64 = torch.float64 in dtypes
    if backend is None:
        # The environment variable and the device pick among what can run this call; only the argument insists.
        wanted = os.environ.get(ENVIRONMENT_VARIABLE) or ("triton" if device.type == "cuda" else "reference")
        if wanted not in NAMES:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}, got {wanted!r}")
        usable = not has_float64 and backends()[wanted].available and _runs_on(wanted, device)
        return wanted if usable else "reference"
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)} or None, got {backend!r}")
    found = backends()[backend]
    if not found.available:
        raise ValueError(f"backend={backend!r} is not available: {found.reason}")
    if backend != "reference" and has_float64:
        raise ValueError(f"backend={backend!r} takes float32, bfloat16 and float16; float64 is for 'reference'")
    if not _runs_on(backend, device):
        raise ValueError(f"backend={backend!r} cannot run on {device}")
    return backend


def _runs_on(name: str, device: torch.device) -> bool:
    if name == "triton":
        return device.type == "cuda" or (device.type == "cpu" and triton_is_interpreted())
    return name == "reference" or name == {"cpu": "cpu", "cuda": "cuda"}.get(device.type)
