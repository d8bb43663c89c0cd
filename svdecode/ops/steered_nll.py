"""`steered_nll`: the NLL of gold tokens at several strengths, from one pass over the logits."""

from __future__ import annotations

from torch import Tensor

from svdecode.constants import ALPHA, KL, PENALTY, BackendName, Direction
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


def steered_nll(
    logits_pre: Tensor,
    logits_ft: Tensor,
    labels: Tensor,
    mu: Tensor,
    *,
    alpha: float = ALPHA,
    penalty: float = PENALTY,
    direction: Direction = KL,
    backend: BackendName | None = None,
) -> Tensor:
    """(..., M) float32, nats: the NLL of the gold tokens under the distributions steered with each of M strengths.

    Convex in mu. +inf where a gold token lies outside K and the penalty is -inf, 0 where the label is ignored.
    Differentiable in both logits and in mu.

    Args:
        logits_pre: (..., V) logits of the pre-trained model.
        logits_ft: (..., V) logits of the warm-started model.
        labels: (...) int64 or int32 gold tokens, -100 ignored.
        mu: (M,) floating-point strengths.
        alpha: confidence threshold in [0, 1].
        penalty: lambda <= 0 for tokens outside K.
        direction: "kl" or "log_ratio".
        backend: "reference", "cpu", "triton", "cuda", or None to pick by device (see `svdecode.backends`).

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction, penalty)
    validation.check_labels(labels, logits_ft)
    strengths = validation.check_strengths(mu, logits_ft)
    settings = (alpha, penalty, direction)
    return _STEERED_NLL(backend, (logits_pre, logits_ft, labels, strengths, *settings), labels)[0]


def _run(logits_pre, logits_ft, labels, mu, alpha, penalty, direction, backend):
    check_tensors(logits_pre, logits_ft, labels)
    run = implementation(backend, "steered_nll")
    nll, saved = run(logits_pre, logits_ft, labels, mu, alpha, penalty, direction)
    return nll, present(saved, logits_ft)


def _fake(logits_pre, logits_ft, labels, mu, alpha, penalty, direction, backend):
    check_tensors(logits_pre, logits_ft, labels, values=False)
    nll = rows_like(logits_ft, float_dtype(logits_pre, logits_ft), mu.shape[0])
    return nll, saved_like(logits_ft, backend)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    save(ctx, (*inputs[:4], *output), inputs[4:])


def _autograd(ctx, grad_nll, _saved):
    if grad_nll is None:
        return (None,) * 8
    *settings, backend = ctx.settings
    needs = ctx.needs_input_grad[:2]
    *grads, grad_mu = _BACKWARD.derivative(grad_nll, *ctx.saved_tensors, *settings, *needs, backend=backend)
    mu_grad = grad_mu.to(ctx.saved_tensors[3].dtype) if ctx.needs_input_grad[3] else None
    return (*needed(ctx, grads), None, mu_grad, *(None,) * 4)


def _backward_fake(grad_nll, logits_pre, logits_ft, labels, mu, nll, saved, *settings):
    grad_mu = mu.new_empty(mu.shape, dtype=float_dtype(logits_pre, logits_ft))
    return (*logits_grads_like(logits_pre, logits_ft, *settings[-3:-1]), grad_mu)


_STEERED_NLL = Operator(
    "steered_nll",
    f"{PAIR}, Tensor labels, Tensor mu, float alpha, float penalty, str direction",
    2,
    _run,
    _fake,
    _autograd,
    _setup_context,
    watched=4,
)
_BACKWARD = Operator(
    "steered_nll_backward",
    f"Tensor grad_nll, {PAIR}, Tensor labels, Tensor mu, Tensor nll, Tensor saved, "
    f"float alpha, float penalty, str direction, {NEEDS}",
    3,
    runner("steered_nll_backward"),
    _backward_fake,
)
