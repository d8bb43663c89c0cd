"""`optimal_strength`: the strength that each gold token asks for."""

from __future__ import annotations

from torch import Tensor

from svdecode.constants import ALPHA, EPS, KL, BackendName, Direction
from svdecode.ops import validation
from svdecode.ops.backends import implementation
from svdecode.ops.fused_steer import FUSED_STEER_BACKWARD
from svdecode.ops.torch_library import (
    PAIR,
    Operator,
    check_tensors,
    float_dtype,
    needed,
    present,
    rows_like,
    save,
    saved_like,
)


def optimal_strength(
    logits_pre: Tensor,
    logits_ft: Tensor,
    labels: Tensor,
    *,
    alpha: float = ALPHA,
    direction: Direction = KL,
    eps: float = EPS,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """The strength that a gold token asks for, mu* = N / (D + eps) (Eq. 41 / 43), and its moments; sums over K.

        N = [y in K] delta_y - sum p delta
        D = sum delta^2
        H = sum p delta^2 - (sum p delta)^2

    N / (H + eps) is the Newton step with the exact curvature. Nothing of size (..., V) is allocated by the kernels.

    Args:
        logits_pre: (..., V) logits of the pre-trained model.
        logits_ft: (..., V) logits of the warm-started model.
        labels: (...) int64 or int32 gold tokens; -100 gives zeros.
        alpha: confidence threshold in [0, 1].
        direction: "kl" or "log_ratio".
        eps: added to the denominator.
        backend: "reference", "cpu", "triton", "cuda", or None to pick by device (see `svdecode.backends`).

    Returns:
        mu_star (...) float32 and moments (..., 3) float32: N, D, H.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction, eps=eps)
    validation.check_labels(labels, logits_ft)
    return _OPTIMAL_STRENGTH(backend, (logits_pre, logits_ft, labels, alpha, direction, eps), labels)[:2]


def _run(logits_pre, logits_ft, labels, alpha, direction, eps, backend):
    check_tensors(logits_pre, logits_ft, labels)
    run = implementation(backend, "optimal_strength")
    mu_star, moments, saved = run(logits_pre, logits_ft, labels, alpha, direction, eps)
    return mu_star, moments, present(saved, logits_ft)


def _fake(logits_pre, logits_ft, labels, alpha, direction, eps, backend):
    check_tensors(logits_pre, logits_ft, labels, values=False)
    dtype = float_dtype(logits_pre, logits_ft)
    return rows_like(logits_ft, dtype), rows_like(logits_ft, dtype, 3), saved_like(logits_ft, backend)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[2])
    save(ctx, (*inputs[:3], *output), inputs[3:])


def _autograd(ctx, grad_mu_star, grad_moments, _saved):
    logits_pre, logits_ft, labels, mu_star, moments, saved = ctx.saved_tensors
    alpha, direction, eps, backend = ctx.settings
    # The moments do not depend on the penalty, and without a gradient of log-probs nothing else does either.
    *grads, _ = FUSED_STEER_BACKWARD.derivative(
        *(None, None, None, grad_mu_star, grad_moments),
        *(logits_pre, logits_ft, None, labels, mu_star, present(None, logits_ft), moments, saved),
        *(alpha, 0.0, direction, eps, *ctx.needs_input_grad[:2]),
        backend=backend,
    )
    return (*needed(ctx, grads), *(None,) * 5)


_OPTIMAL_STRENGTH = Operator(
    "optimal_strength",
    f"{PAIR}, Tensor labels, float alpha, str direction, float eps",
    3,
    _run,
    _fake,
    _autograd,
    _setup_context,
    watched=3,
)
