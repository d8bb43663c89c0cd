"""How an operator gets under `torch.ops.svdecode`: schema, implementation, fake and autograd.

`Library.impl` costs 1.3 us a call where `torch.library.custom_op` costs 7 to 10 us, hence the former. Every schema ends in
the name of the backend, which the public functions of `ops.py` resolve. A tensor that a call does not ask for comes back
with shape (0,), since a schema cannot return an optional tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svdecode.backends import implementation

SAVED_FIELDS = 6
"""What a kernel keeps of each row for its backward, float32; kernels/fused_steer.py says what."""

_LIBRARY = torch.library.Library("svdecode", "DEF")


def define(
    name: str,
    arguments: str,
    results: str,
    run: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Register one operator."""
    _LIBRARY.define(f"{name}({arguments}, str backend) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"svdecode::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"svdecode::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def runner(name: str) -> Callable:
    """An implementation that passes everything but the backend's name on to the backend."""

    def run(*arguments):
        *arguments, backend = arguments
        return implementation(backend, name)(*arguments)

    return run


def float_dtype(logits_pre: Tensor, logits_ft: Tensor) -> torch.dtype:
    """float64 where an input is (the reference alone takes it), else float32."""
    return torch.float64 if torch.float64 in (logits_pre.dtype, logits_ft.dtype) else torch.float32


def rows_like(logits: Tensor, dtype: torch.dtype, *trailing: int) -> Tensor:
    """An uninitialised (..., *trailing) tensor for logits (..., V)."""
    return logits.new_empty((*logits.shape[:-1], *trailing), dtype=dtype)


def present(value: Tensor | None, like: Tensor) -> Tensor:
    """The value, or the (0,) tensor that stands for None."""
    return like.new_empty(0, dtype=torch.float32) if value is None else value


def saved_like(logits: Tensor, backend: str) -> Tensor:
    """The `saved` result: the reference keeps nothing and computes everything again."""
    return present(None if backend == "reference" else rows_like(logits, torch.float32, SAVED_FIELDS), logits)


def logits_grads_like(logits_pre: Tensor, logits_ft: Tensor, need_pre: bool, need_ft: bool) -> list[Tensor]:
    """Gradients as every backward returns them: contiguous, in the dtypes of the logits, (0,) where not needed."""
    needs = ((logits_pre, need_pre), (logits_ft, need_ft))
    return [x.new_empty(x.shape if need else (0,)) for x, need in needs]


def save(ctx, tensors: tuple[Tensor | None, ...], settings: tuple) -> None:
    """Keep what the backward needs."""
    ctx.set_materialize_grads(False)  # an output that no loss uses costs no (..., V) tensor of zeros
    ctx.save_for_backward(*tensors)
    ctx.settings = settings


def needed(ctx, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of both logits, None where none is needed."""
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
