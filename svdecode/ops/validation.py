"""Every check of an argument, in one place: the kernels behind them check nothing.

A wrong type raises TypeError, a wrong value ValueError; both name the argument and show what was given.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from svdecode.constants import DIRECTIONS, IGNORE_INDEX

_NUMBERS: Any = (Real, torch.SymFloat, torch.SymInt)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: Any) -> Tensor:
    """Return `value` if it is a tensor, else raise TypeError naming it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def check_logits(logits_pre: Any, logits_ft: Any) -> None:
    """Both (..., V) floating-point tensors, of one shape, on one device."""
    # All that is right passes here, in less than 1 us; what follows finds out what is wrong.
    if (
        isinstance(logits_pre, Tensor)
        and isinstance(logits_ft, Tensor)
        and logits_pre.shape == (shape := logits_ft.shape)
        and logits_pre.dtype in FLOAT_DTYPES
        and logits_ft.dtype in FLOAT_DTYPES
        and logits_pre.device == logits_ft.device
        and shape
        and shape[-1] != 0
    ):
        return
    check_tensor("logits_pre", logits_pre)
    check_tensor("logits_ft", logits_ft)
    for name, logits in (("logits_pre", logits_pre), ("logits_ft", logits_ft)):
        if logits.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name} needs a vocabulary as its last dimension, got shape {tuple(logits.shape)}")
    if logits_pre.shape[-1] != logits_ft.shape[-1]:
        raise ValueError(
            f"logits_pre and logits_ft have different vocabularies: {logits_pre.shape[-1]} and {logits_ft.shape[-1]}"
        )
    if logits_pre.shape != logits_ft.shape:
        raise ValueError(
            f"logits_pre and logits_ft differ in shape: {tuple(logits_pre.shape)} and {tuple(logits_ft.shape)}"
        )
    if logits_pre.device != logits_ft.device:
        raise ValueError(f"logits_pre and logits_ft are on different devices: {logits_pre.device}, {logits_ft.device}")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` as a float if it is a number in [low, high] (infinite only where a bound is), else raise."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, _NUMBERS)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return value


def check_finite(name: str, value: Any) -> float:
    """Return `value` if it is a finite number, else raise."""
    value = check_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_count(name: str, value: Any, low: int = 1) -> int:
    """Return `value` if it is an integer of at least `low`, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        kind = "a positive integer" if low == 1 else f"an integer of at least {low}"
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    return value


def check_settings(alpha: Any, direction: Any, penalty: Any = 0.0, eps: Any = 0.0) -> None:
    """The settings that every operator shares: alpha in [0, 1], penalty <= 0, eps >= 0, a known direction."""
    # All that is right passes here, in a quarter of the time; what follows finds out what is wrong.
    floats = type(alpha) is type(penalty) is type(eps) is float
    if floats and 0.0 <= alpha <= 1.0 and penalty <= 0.0 <= eps and direction in DIRECTIONS:
        return
    check_number("alpha", alpha, 0.0, 1.0)
    check_number("penalty", penalty, -math.inf, 0.0)
    check_number("eps", eps, 0.0)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")


def check_labels(labels: Any, logits: Tensor) -> None:
    """(...) integer tensor with the leading dimensions and device of `logits`."""
    labels = check_tensor("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"labels and logits are on different devices: {labels.device} and {logits.device}")


def check_label_range(labels: Tensor, vocabulary: int) -> None:
    """Labels in [0, vocabulary) or IGNORE_INDEX. On a GPU this is left out: it would make the host wait for every call.

    There an out-of-range label gives NaN in its row and never an illegal access.
    """
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    if labels.numel() <= 64:  # quicker without torch, whose operations cost microseconds each
        values = labels.flatten().tolist()
        low, high = min(values), max(values)
    else:
        low, high = labels.aminmax()
    if low >= 0 and high < vocabulary:
        return
    used = labels[labels != IGNORE_INDEX]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < vocabulary:
        raise ValueError(
            f"labels must be in [0, {vocabulary}) or {IGNORE_INDEX}, got values from {used.min()} to {used.max()}"
        )


def check_strength(mu: Any, logits: Tensor) -> float | Tensor:
    """Return mu if it is a finite number or a floating-point tensor that broadcasts to the rows of `logits`, else raise."""
    if type(mu) is float and -math.inf < mu < math.inf:  # the usual call, in 0.1 us
        return mu
    if not isinstance(mu, Tensor):
        return mu if torch.compiler.is_compiling() else check_finite("mu", mu)
    if not mu.dtype.is_floating_point:
        raise ValueError(f"mu must be a floating-point tensor, got {mu.dtype}")
    if mu.dim() and mu.device != logits.device:
        raise ValueError(f"mu and logits are on different devices: {mu.device} and {logits.device}")
    rows = logits.shape[:-1]
    trailing = rows[len(rows) - mu.dim() :]
    if mu.dim() > len(rows) or any(m not in (1, r) for m, r in zip(mu.shape, trailing, strict=True)):
        raise ValueError(f"mu must broadcast to the rows {tuple(rows)}, got shape {tuple(mu.shape)}")
    return mu


def check_strengths(mu: Any, logits: Tensor) -> Tensor:
    """Return the (M,) strengths of `steered_nll` as a tensor on the device of `logits`."""
    mu = check_tensor("mu", mu)
    if mu.dim() != 1 or not mu.dtype.is_floating_point:
        raise ValueError(f"mu must be a (M,) floating-point tensor, got {mu.dtype} of shape {tuple(mu.shape)}")
    if mu.device != logits.device:
        raise ValueError(f"mu and logits are on different devices: {mu.device} and {logits.device}")
    return mu


def check_out(out: Any, logits_pre: Tensor, logits_ft: Tensor) -> Tensor:
    """(..., V) float32 on the device of the logits, last dimension contiguous, in memory that nothing else uses."""
    out = check_tensor("out", out)
    if out.shape != logits_ft.shape or out.dtype != torch.float32 or out.device != logits_ft.device:
        raise ValueError(
            f"out must be float32 of shape {tuple(logits_ft.shape)} on {logits_ft.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"out must be contiguous in its last dimension, got strides {out.stride()}")
    if torch.compiler.is_compiling():  # a traced tensor has no address
        return out
    if not out.is_contiguous() and _rows_overlap(*_row_bytes(out)):
        raise ValueError(f"rows of out must not share memory, got strides {out.stride()} for shape {tuple(out.shape)}")
    for name, logits in (("logits_pre", logits_pre), ("logits_ft", logits_ft)):
        if _overlap(out, logits):
            raise ValueError(f"out must not share memory with {name}: pass a tensor of its own")
    return out


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, contiguous in their last dimension, have a byte in common."""
    start_a, start_b = a.data_ptr(), b.data_ptr()
    if start_a + _extent(a) <= start_b or start_b + _extent(b) <= start_a:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return a.numel() > 0
    # Rows of one buffer may lie between each other: the last row of b that begins before a row of a ends must end before it.
    (starts_a, ends_a), starts_b = _row_bytes(a), _row_bytes(b)[0].sort().values
    before = torch.searchsorted(starts_b, ends_a) - 1
    width = b.shape[-1] * b.element_size()
    return bool(((before >= 0) & (starts_b[before.clamp(min=0)] + width > starts_a)).any())


def _extent(x: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    return (
        x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) if x.numel() else 0
    )


def _row_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row begins and ends in memory, (rows,) int64 each."""
    starts = torch.tensor([x.data_ptr()])
    for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        starts = (starts[:, None] + torch.arange(n) * (stride * x.element_size())).flatten()
    return starts, starts + x.shape[-1] * x.element_size()


def _rows_overlap(starts: Tensor, ends: Tensor) -> bool:
    starts, order = starts.sort()
    return bool((starts[1:] < ends[order][:-1]).any())


def check_sampling(temperature: Any, top_k: Any, top_p: Any) -> None:
    """temperature >= 0, top_k a positive integer or None, top_p in (0, 1] or None."""
    if check_finite("temperature", temperature) < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k must be an integer or None, got {type(top_k).__name__}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and check_number("top_p", top_p, 0.0, 1.0) == 0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def check_k(k: Any, vocabulary: int) -> None:
    """An integer in [1, vocabulary]."""
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be in [1, {vocabulary}], got {k}")
