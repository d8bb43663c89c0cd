"""Which implementation computes an operator: `reference` everywhere, `cpu`, `triton` and `cuda` where they exist."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from svdecode.constants import BackendName
from svdecode.ops import compiled

NAMES = get_args(BackendName)
ENVIRONMENT_VARIABLE = "SVDECODE_BACKEND"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class _Preferred(threading.local):
    """The backend that calls in this thread prefer: `use_backend`'s, else the environment variable's, which is read once."""

    name: str | None = os.environ.get(ENVIRONMENT_VARIABLE)


_PREFERRED = _Preferred()


class Backend(NamedTuple):
    """One row of `backends()`: whether the backend can run here, and what it runs on or why it is missing."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run as numpy on CPU tensors (TRITON_INTERPRET=1), as the tests do without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _missing(name: str) -> str | None:
    """Why a backend cannot run here, or None."""
    if name == "cpu":
        return compiled.WHY_MISSING
    if name == "cuda":
        return compiled.why_cuda_missing()
    if name == "triton" and not _HAS_TRITON:
        return "the package triton is not installed"
    if name == "triton" and not triton_is_interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels slowly on a CPU, for tests)"
    return None


def backends() -> dict[str, Backend]:
    """Every backend by name, with `.available` and `.reason`: what it runs on, or why it is not here.

    `reference` is plain PyTorch (any device, also float64), `triton` the fused Triton kernels, `cpu` and `cuda` the
    compiled C++ and CUDA C++ operators.
    """
    interpreted = triton_is_interpreted()
    runs_on = {
        "reference": lambda: "plain PyTorch",
        "triton": lambda: "interpreted (TRITON_INTERPRET=1)" if interpreted else torch.cuda.get_device_name(),
        "cpu": lambda: f"C++, {compiled.instruction_set()}",
        "cuda": lambda: "emulated on the host" if compiled.CUDA_IS_EMULATED else torch.cuda.get_device_name(),
    }
    missing = {name: _missing(name) for name in NAMES}
    return {name: Backend(why is None, why or runs_on[name]()) for name, why in missing.items()}


@functools.cache
def implementation(name: str, operator: str) -> Callable:
    """The function that computes an operator on a backend; its module is imported on first use."""
    if name in ("cpu", "cuda"):
        found = compiled.implementation(name, operator)
        if found is not None:
            return found
        name = "triton" if _HAS_TRITON else "reference"
    if name == "triton":
        return importlib.import_module("svdecode.kernels").operator(operator)
    if name != "reference":
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    part = "reference_backward" if operator.endswith("_backward") else "reference"
    return getattr(importlib.import_module(f"svdecode.ops.{part}"), operator)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer a backend for every call in a block that leaves `backend=` out; in this thread alone.

    A call that the backend cannot run (float64, another device) takes the reference, as with the environment variable
    SVDECODE_BACKEND.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: no such backend, or it is not available here.
    """
    _check_available(name)
    before = _PREFERRED.name
    _PREFERRED.name = name
    try:
        yield
    finally:
        _PREFERRED.name = before


def choose(backend: str | None, logits_pre: Tensor, logits_ft: Tensor) -> str:
    """The backend of a call: the argument, else the preferred one, else by the device; float64 is for the reference."""
    device = logits_ft.device.type
    has_float64 = torch.float64 in (logits_pre.dtype, logits_ft.dtype)
    if backend is None:
        # The preference and the device pick among what can run this call; only the argument insists.
        wanted = _PREFERRED.name or _BY_DEVICE.get(device, "reference")
        if wanted not in NAMES:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}, got {wanted!r}")
        return wanted if _runs_on(wanted, device) and not has_float64 else "reference"
    _check_available(backend)
    if backend != "reference" and has_float64:
        raise ValueError(f"backend={backend!r} takes float32, bfloat16 and float16; float64 is for 'reference'")
    if not _runs_on(backend, device):
        raise ValueError(f"backend={backend!r} cannot run on {device}")
    return backend


def _check_available(backend: str) -> None:
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)} or None, got {backend!r}")
    why = _missing(backend)
    if why is not None:
        raise ValueError(f"backend={backend!r} is not available: {why}")


_REMEMBERED: dict[tuple, Callable] = {}


def implementation_for(operator: str, backend: str | None, logits_pre: Tensor, logits_ft: Tensor) -> Callable:
    """What computes an operator on these logits; remembered, since finding it takes a tenth of a small call."""
    key = (operator, backend, _PREFERRED.name, logits_ft.device, logits_pre.dtype, logits_ft.dtype)
    run = _REMEMBERED.get(key)
    if run is None:
        run = _REMEMBERED[key] = implementation(choose(backend, logits_pre, logits_ft), operator)
    return run


_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}
"""Where nothing is asked for. The CUDA operators may replace Triton where a GPU has measured them faster; none has yet."""


def _runs_on(name: str, device: str) -> bool:
    if name == "triton":
        return _HAS_TRITON and (device == "cuda" or (device == "cpu" and triton_is_interpreted()))
    if name == "cpu":
        return device == "cpu" and compiled.WHY_MISSING is None
    if name == "cuda":
        return device == ("cpu" if compiled.CUDA_IS_EMULATED else "cuda") and compiled.HAS_CUDA
    return name == "reference"
