"""`steering_vector`: the direction in logit space alone."""

from __future__ import annotations

from torch import Tensor

from svdecode.constants import KL, BackendName, Direction
from svdecode.ops import validation
from svdecode.ops.backends import implementation
from svdecode.ops.torch_library import (
    NEEDS,
    PAIR,
    Operator,
    check_tensors,
    float_dtype,
    logits_grads_like,
    needed,
    present,
    rows_like,
    runner,
    save,
    saved_like,
)


def steering_vector(
    logits_pre: Tensor,
    logits_ft: Tensor,
    *,
    alpha: float = 0.0,
    direction: Direction = KL,
    backend: BackendName | None = None,
) -> Tensor:
    """(..., V) float32: delta = J(p) grad KL(p || p_pre) = p * c on K, 0 elsewhere (Eq. 10, pointing towards the task).

    With alpha = 0 the entries of a row sum to 0. Differentiable in both logits.

    Args:
        logits_pre: (..., V) logits of the pre-trained model.
        logits_ft: (..., V) logits of the warm-started model.
        alpha: confidence threshold in [0, 1]; 0 keeps every token.
        direction: "kl" for delta = p * c, "log_ratio" for delta = c.
        backend: "reference", "cpu", "triton", "cuda", or None to pick by device (see `svdecode.backends`).

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction)
    return _STEERING_VECTOR(backend, (logits_pre, logits_ft, alpha, direction))[0]


def _run(logits_pre, logits_ft, alpha, direction, backend):
    check_tensors(logits_pre, logits_ft)
    delta, saved = implementation(backend, "steering_vector")(logits_pre, logits_ft, alpha, direction)
    return delta, present(saved, logits_ft)


def _fake(logits_pre, logits_ft, alpha, direction, backend):
    check_tensors(logits_pre, logits_ft)
    return rows_like(logits_ft, float_dtype(logits_pre, logits_ft), logits_ft.shape[-1]), saved_like(logits_ft, backend)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    save(ctx, (*inputs[:2], output[1]), inputs[2:])


def _autograd(ctx, grad_delta, _saved):
    if grad_delta is None:
        return (None,) * 5
    *settings, backend = ctx.settings
    needs = ctx.needs_input_grad[:2]
    grads = _BACKWARD.derivative(grad_delta, *ctx.saved_tensors, *settings, *needs, backend=backend)
    return (*needed(ctx, grads), None, None, None)


_STEERING_VECTOR = Operator(
    "steering_vector", f"{PAIR}, float alpha, str direction", 2, _run, _fake, _autograd, _setup_context
)
_BACKWARD = Operator(
    "steering_vector_backward",
    f"Tensor grad_delta, {PAIR}, Tensor saved, float alpha, str direction, {NEEDS}",
    2,
    runner("steering_vector_backward"),
    lambda *arguments: tuple(logits_grads_like(*arguments[1:3], *arguments[-3:-1])),
)
