"""Gradients of fused_steer, optimal_strength, steered_nll and steering_vector in both logits and in mu.

The equations are those of `svdecode/ops/reference_backward.py`: h = dL/dzs, u = dL/ddelta and w = dL/dp on K, then

    dL/dc = u p (or u)      s = -sum dL/dc      dL/dd = dL/dc + s p      q = w [+ u c] + s d
    dL/dz = h + dL/dd + p (q - <p, q>)          dL/da = -dL/dd

The forward saves nothing of size (..., V). A token's p, c, delta and zs come again from its logits and the row's saved numbers.
s and <p, q> are sums over K alone (<p, d - dbar> = 0): with a penalty of -inf the two passes that sum read logits_ft, and the
rest only of tiles with kept tokens; the last pass reads both inputs and writes both gradients. MODE says where h, u and w come
from:

    STEER    gradients of log-probs, KL, mu_star and moments      VECTOR    u is the gradient of delta
    NLL      h = sum_m G_m (softmax(zs_m) - e_y), u = sum_m mu_m h_m

Launches: `steer_gradient_sums_kernel` and `gradient_coefficients_kernel` (STEER) or `strength_gradient_kernel` (NLL), all
in `gradient_sums.py`; then `delta_gradient_sums_kernel` and `logits_gradient_kernel` in `logits_gradient.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdecode.constants import KL
from svdecode.kernels.arguments import log_threshold
from svdecode.kernels.gradient_sums import (
    COEFFICIENTS,
    GRADIENT_FIELDS,
    gradient_coefficients_kernel,
    steer_gradient_sums_kernel,
    strength_gradient_kernel,
)
from svdecode.kernels.launch import launch
from svdecode.kernels.logits_gradient import NLL, STEER, VECTOR, delta_gradient_sums_kernel, logits_gradient_kernel
from svdecode.kernels.row_layout import RowLayout, on_device_of
from svdecode.kernels.settings import LAUNCH, TILE, TILES, next_power_of_2, splits


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _flat(values: Tensor | None) -> Tensor | None:
    """A row's scalars, or (rows, fields), as contiguous float32."""
    return None if values is None else values.float().contiguous()


def _logits_gradient(
    mode: int,
    layout: RowLayout,
    grad: Tensor | None,
    saved: Tensor,
    *,
    alpha: float,
    penalty: float,
    direction: str,
    needed: tuple[bool, bool],
    coefficients: Tensor | None = None,
    mu: Tensor | None = None,
    labels: Tensor | None = None,
    nll: Tensor | None = None,
    kl: Tensor | None = None,
) -> list[Tensor]:
    """The two passes over tokens; a gradient that is not needed comes back empty."""
    pre, ft = layout.tensors[:2]
    vocabulary = ft.shape[-1]
    rows, num_splits = ft.numel() // vocabulary, splits(vocabulary)
    outputs = [
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((pre, ft), needed, strict=True)
    ]
    if rows == 0 or not any(needed):
        return outputs
    dense = grad is not None and mode != NLL.value
    sums = _new(ft, rows, 2, num_splits)
    inputs = (pre, ft, grad, saved, coefficients, mu, labels, nll, sums)
    numbers = (
        *(log_threshold(alpha), penalty, vocabulary, num_splits, 0 if mode != NLL.value else mu.shape[0]),
        layout.of(pre, ft, grad if dense else ft),
    )
    shared = dict(
        KL_DIRECTION=direction == KL,
        DROP=penalty == -math.inf,
        MODE=mode,
        DENSE=dense,
        LABELS=labels is not None,
        TILES=TILES,
        TILE=TILE,
        **LAUNCH,
    )
    launch(delta_gradient_sums_kernel, (rows * num_splits,), (*inputs, *numbers), shared)
    launch(
        logits_gradient_kernel,
        (rows * num_splits,),
        (*inputs, kl, *outputs, *numbers),
        dict(
            GRAD_KL=kl is not None,
            NEED_PRE=needed[0],
            NEED_FT=needed[1],
            SPLITS=next_power_of_2(num_splits),
            **shared,
        ),
    )
    return outputs


def fused_steer_backward(
    grad_logprobs: Tensor | None,
    grad_mu: Tensor | None,
    grad_kl: Tensor | None,
    grad_mu_star: Tensor | None,
    grad_moments: Tensor | None,
    logits_pre: Tensor,
    logits_ft: Tensor,
    mu: Tensor | None,
    labels: Tensor | None,
    strength: Tensor,
    kl: Tensor,
    moments: Tensor,
    saved: Tensor,
    alpha: float,
    penalty: float,
    direction: str,
    eps: float,
    need_pre: bool,
    need_ft: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dlogits_pre, dL/dlogits_ft, dL/dmu (...)) from the gradients of the outputs, None standing for zero."""
    dense = grad_logprobs is not None
    layout = RowLayout(logits_pre, logits_ft, *([grad_logprobs] if dense else []))
    pre, ft, *grads = layout.tensors
    grad = grads[0] if dense else None
    vocabulary = ft.shape[-1]
    rows, num_splits = ft.numel() // vocabulary, splits(vocabulary)
    grad_strength = _new(ft, *ft.shape[:-1])
    with on_device_of(ft):
        strength = strength.float().reshape(-1).contiguous()
        labels = None if labels is None else labels.reshape(-1).contiguous()
        coefficients = _new(ft, rows, COEFFICIENTS.value)
        sums = _new(ft, rows, GRADIENT_FIELDS.value, num_splits) if dense else None
        drop = penalty == -math.inf
        if rows and dense:
            numbers = (log_threshold(alpha), penalty, vocabulary, num_splits, layout.of(pre, ft, grad))
            launch(
                steer_gradient_sums_kernel,
                (rows * num_splits,),
                (pre, ft, grad, saved, strength, sums, *numbers),
                dict(KL_DIRECTION=direction == KL, DROP=drop, TILES=TILES, TILE=TILE, **LAUNCH),
            )
        if rows:
            grads = (_flat(g) for g in (grad_mu, grad_kl, grad_mu_star, grad_moments))
            outputs = (coefficients, grad_strength, penalty, eps, num_splits)
            launch(
                gradient_coefficients_kernel,
                (rows,),
                (sums, saved, strength, labels, moments, kl, *grads, *outputs),
                dict(
                    DROP=drop,
                    DENSE=dense,
                    OWN_STRENGTH=mu is None and labels is not None,
                    LABELS=labels is not None,
                    SPLITS=next_power_of_2(num_splits),
                    num_warps=1,
                ),
            )
        grad_pre, grad_ft = _logits_gradient(
            STEER.value,
            layout,
            grad,
            saved,
            alpha=alpha,
            penalty=penalty,
            direction=direction,
            needed=(need_pre, need_ft),
            coefficients=coefficients,
            mu=strength,
            labels=labels,
            kl=kl if grad_kl is not None else None,
        )
    return grad_pre, grad_ft, grad_strength


def steered_nll_backward(
    grad_nll: Tensor,
    logits_pre: Tensor,
    logits_ft: Tensor,
    labels: Tensor,
    mu: Tensor,
    nll: Tensor,
    saved: Tensor,
    alpha: float,
    penalty: float,
    direction: str,
    need_pre: bool,
    need_ft: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dlogits_pre, dL/dlogits_ft, dL/dmu (M,)) from grad_nll (..., M)."""
    layout = RowLayout(logits_pre, logits_ft)
    pre, ft = layout.tensors
    grad, strengths, labels = _flat(grad_nll), _flat(mu), labels.reshape(-1).contiguous()
    per_row = _new(ft, labels.numel(), mu.shape[0])
    with on_device_of(ft):
        if per_row.numel():
            numbers = (log_threshold(alpha), penalty, ft.shape[-1], mu.shape[0], layout.of(pre, ft))
            launch(
                strength_gradient_kernel,
                tuple(per_row.shape),
                (pre, ft, grad, saved, strengths, labels, nll, per_row, *numbers),
                dict(KL_DIRECTION=direction == KL, DROP=penalty == -math.inf, TILE=TILE, **LAUNCH),
            )
        grad_pre, grad_ft = _logits_gradient(
            NLL.value,
            layout,
            grad,
            saved,
            alpha=alpha,
            penalty=penalty,
            direction=direction,
            needed=(need_pre, need_ft),
            mu=strengths,
            labels=labels,
            nll=nll,
        )
    return grad_pre, grad_ft, per_row.sum(0)


def steering_vector_backward(
    grad_delta: Tensor,
    logits_pre: Tensor,
    logits_ft: Tensor,
    saved: Tensor,
    alpha: float,
    direction: str,
    need_pre: bool,
    need_ft: bool,
) -> tuple[Tensor, Tensor]:
    """(dL/dlogits_pre, dL/dlogits_ft) from grad_delta (..., V)."""
    layout = RowLayout(logits_pre, logits_ft, grad_delta)
    with on_device_of(layout.tensors[1]):
        return tuple(
            _logits_gradient(
                VECTOR.value,
                layout,
                layout.tensors[2],
                saved,
                alpha=alpha,
                penalty=-math.inf,
                direction=direction,
                needed=(need_pre, need_ft),
            )
        )
