"""Gradients of fused_steer, optimal_strength, steered_nll and steering_vector in both logits and in mu.

The equations are those of `svdecode/ops/reference_backward.py`: h = dL/dzs, u = dL/ddelta and w = dL/dp on K, then

    dL/dc = u p (or u)      s = -sum dL/dc      dL/dd = dL/dc + s p      q = w [+ u c] + s d
    dL/dz = h + dL/dd + p (q - <p, q>)          dL/da = -dL/dd

The forward saves nothing of size (..., V). A token's p, c, delta and zs come again from its logits and the row's saved numbers.
s and <p, q> are sums over K alone (<p, d - dbar> = 0). The first launch finds the tiles with a kept token in logits_ft, the
launches that sum read those tiles, and the last one reads both inputs and writes both gradients. MODE says where h, u and w
come from:

    STEER    gradients of log-probs, KL, mu_star and moments      VECTOR    u is the gradient of delta
    NLL      h = sum_m G_m (softmax(zs_m) - e_y), u = sum_m mu_m h_m

Launches: `tile_maxima_kernel`, then `steer_gradient_sums_kernel` and `gradient_coefficients_kernel` (STEER) or
`strength_gradient_kernel` (NLL), all in `gradient_sums.py`; then `delta_gradient_sums_kernel` and `logits_gradient_kernel` in
`logits_gradient.py` over `token_gradients.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdecode.constants import KL
from svdecode.kernels.arguments import log_threshold
from svdecode.kernels.gradient_sums import (
    gradient_coefficients_kernel,
    steer_gradient_sums_kernel,
    strength_gradient_kernel,
    tile_maxima_kernel,
)
from svdecode.kernels.launch import launch
from svdecode.kernels.logits_gradient import delta_gradient_sums_kernel, logits_gradient_kernel
from svdecode.kernels.row_layout import RowLayout, on_device_of
from svdecode.kernels.row_statistics import Workspace
from svdecode.kernels.settings import LAUNCH, groups
from svdecode.kernels.token_gradients import NLL, STEER, VECTOR


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _flat(values: Tensor | None) -> Tensor | None:
    """A row's scalars, or (rows, fields), as contiguous float32."""
    return None if values is None else values.float().contiguous()


def _tile_maxima(layout: RowLayout) -> Workspace:
    """A workspace with the maxima of the tiles of logits_ft."""
    space, ft = Workspace(layout), layout.tensors[1]
    launch(
        tile_maxima_kernel,
        (space.rows, space.splits, 1),
        (ft, space.memory, space.vocabulary, 0, layout.of(ft)),
        space.stream_constants,
    )
    return space


def _logits_gradient(
    mode: int,
    layout: RowLayout,
    space: Workspace,
    grad: Tensor | None,
    saved: Tensor,
    *,
    alpha: float,
    penalty: float,
    direction: str,
    needed: tuple[bool, bool],
    mu: Tensor | None = None,
    labels: Tensor | None = None,
    nll: Tensor | None = None,
    kl: Tensor | None = None,
) -> list[Tensor]:
    """The last two launches; a gradient that is not needed comes back empty."""
    pre, ft = layout.tensors[:2]
    outputs = [
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((pre, ft), needed, strict=True)
    ]
    if not any(needed):
        return outputs
    dense = grad is not None and mode != NLL.value
    inputs = (pre, ft, grad, saved, space.memory, mu, labels, nll)
    numbers = (
        log_threshold(alpha),
        penalty,
        mu.shape[0] if mode == NLL.value else 0,
        space.vocabulary,
        space.num_tiles,
    )
    rows = layout.of(pre, ft, grad if dense else ft)
    shared = {
        "KL_DIRECTION": direction == KL,
        "DROP": penalty == -math.inf,
        "MODE": mode,
        "DENSE": dense,
        "LABELS": labels is not None,
        **space.constants,
    }
    count, size = groups(space.rows, space.num_tiles)
    launch(delta_gradient_sums_kernel, (space.rows, count, 1), (*inputs, *numbers, size, 0, rows), shared)
    launch(
        logits_gradient_kernel,
        (space.rows, space.splits, 1),
        (*inputs, kl, *outputs, *numbers, 0, rows),
        {
            "GRAD_KL": kl is not None,
            "NEED_PRE": needed[0],
            "NEED_FT": needed[1],
            **shared,
            **space.stream_constants,
        },
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
    grad_strength = _new(ft, *ft.shape[:-1])
    if grad_strength.numel() == 0:
        return _nothing(logits_pre, need_pre), _nothing(logits_ft, need_ft), grad_strength
    with on_device_of(ft):
        strength = strength.float().reshape(-1).contiguous()
        labels = None if labels is None else labels.reshape(-1).contiguous()
        drop = penalty == -math.inf
        space = _tile_maxima(layout)
        if dense:
            count, size = groups(space.rows, space.num_tiles)
            launch(
                steer_gradient_sums_kernel,
                (space.rows, count, 1),
                (
                    *(pre, ft, grad, saved, strength, space.memory, log_threshold(alpha), penalty),
                    *(space.vocabulary, space.num_tiles, size, 0, layout.of(pre, ft, grad)),
                ),
                {"KL_DIRECTION": direction == KL, "DROP": drop, **space.constants},
            )
        launch(
            gradient_coefficients_kernel,
            (space.rows, 1, 1),
            (
                *(space.memory, saved, strength, labels, moments, kl),
                *(_flat(g) for g in (grad_mu, grad_kl, grad_mu_star, grad_moments)),
                *(grad_strength, log_threshold(alpha), penalty, eps, space.num_tiles),
            ),
            {
                "DROP": drop,
                "DENSE": dense,
                "OWN_STRENGTH": mu is None and labels is not None,
                "LABELS": labels is not None,
                "WIDTH": space.width,
                **LAUNCH,
            },
        )
        grad_pre, grad_ft = _logits_gradient(
            STEER.value,
            layout,
            space,
            grad,
            saved,
            alpha=alpha,
            penalty=penalty,
            direction=direction,
            needed=(need_pre, need_ft),
            mu=strength,
            labels=labels,
            kl=kl if grad_kl is not None else None,
        )
    return grad_pre, grad_ft, grad_strength


def _nothing(logits: Tensor, needed: bool) -> Tensor:
    """The gradient of logits without rows."""
    return logits.new_empty(logits.shape if needed else (0,))


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
    if labels.numel() == 0:
        return _nothing(logits_pre, need_pre), _nothing(logits_ft, need_ft), per_row.sum(0)
    with on_device_of(ft):
        space = _tile_maxima(layout)
        if per_row.numel():
            launch(
                strength_gradient_kernel,
                (*per_row.shape, 1),
                (
                    *(
                        pre,
                        ft,
                        grad,
                        saved,
                        strengths,
                        labels,
                        nll,
                        space.memory,
                        per_row,
                        log_threshold(alpha),
                        penalty,
                    ),
                    *(mu.shape[0], space.vocabulary, space.num_tiles, 0, layout.of(pre, ft)),
                ),
                {"KL_DIRECTION": direction == KL, "DROP": penalty == -math.inf, **space.constants},
            )
        grad_pre, grad_ft = _logits_gradient(
            NLL.value,
            layout,
            space,
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
    if grad_delta.numel() == 0:
        return _nothing(logits_pre, need_pre), _nothing(logits_ft, need_ft)
    layout = RowLayout(logits_pre, logits_ft, grad_delta)
    with on_device_of(layout.tensors[1]):
        return tuple(
            _logits_gradient(
                VECTOR.value,
                layout,
                _tile_maxima(layout),
                layout.tensors[2],
                saved,
                alpha=alpha,
                penalty=-math.inf,
                direction=direction,
                needed=(need_pre, need_ft),
            )
        )
