"""Gradients of the operators in plain PyTorch, from the inputs alone: nothing of size (..., V) is saved by a forward.

With h = dL/dzs, u = dL/ddelta (on K) and w = dL/dp at fixed delta, and s = -sum_v dL/dc_v what reaches dbar:

    direction "kl"          dL/dc = u p,   and w gains u c, since delta = p c
    direction "log_ratio"   dL/dc = u
    dL/dd = dL/dc + s p                     d = z - a enters c and dbar
    q     = w + s d                         p enters delta, the moments and dbar
    dL/dz = h + dL/dd + p (q - <p, q>)      the last term is the softmax Jacobian
    dL/da = -dL/dd

and KL adds p c to dL/dz and softmax(a) - p to dL/da. K is a constant, and so is an output of -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdecode.constants import IGNORE_INDEX, KL
from svdecode.ops.reference import Rows, label_moments, row_values, steered_logits


def _through_delta(
    rows: Rows, logits_pre: Tensor, direction: str, h: Tensor, u: Tensor, w: Tensor, grad_kl: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dL/da, dL/dz) in the dtypes of computation; see the module's equations."""
    z, p = rows.z, rows.p
    a = logits_pre.to(z).masked_fill(rows.invalid[..., None], 0.0)
    has_both = (a > -math.inf) & (z > -math.inf)
    d = z.masked_fill(~has_both, 0.0) - a.masked_fill(~has_both, 0.0)
    c = torch.where(has_both, d - (p * d).sum(-1, keepdim=True), 0.0)
    u = torch.where(rows.kept & has_both, u, 0.0)
    w = torch.where(rows.kept, w, 0.0)
    grad_c = u * p if direction == KL else u
    if direction == KL:
        w = w + u * c
    s = -grad_c.sum(-1, keepdim=True)
    grad_d = torch.where(has_both, grad_c + s * p, 0.0)
    q = w + s * d
    grad_z = h + grad_d + p * (q - (p * q).sum(-1, keepdim=True))
    grad_a = -grad_d
    if grad_kl is not None:
        grad_kl = torch.where(torch.isfinite(rows.kl), grad_kl, 0.0)[..., None]
        grad_z = grad_z + grad_kl * p * c
        grad_a = grad_a + grad_kl * (torch.softmax(a, -1) - p)
    return tuple(g.masked_fill(rows.invalid[..., None], 0.0) for g in (grad_a, grad_z))


def _in_dtypes(
    grads: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor], needs: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of the logits, (0,) where none is needed."""
    return tuple(g.to(x.dtype) if need else x.new_empty(0) for g, x, need in zip(grads, logits, needs, strict=True))


def _through_steer(rows: Rows, h: Tensor, mu: Tensor, penalty: float) -> Tensor:
    """dL/dmu (...) of zs = z + mu delta on K, z + |mu| penalty elsewhere."""
    grad_mu = (h * torch.where(rows.kept, rows.delta, 0.0)).sum(-1)
    if penalty > -math.inf:
        grad_mu = grad_mu + mu.sign() * penalty * torch.where(rows.kept, 0.0, h).sum(-1)
    return grad_mu


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
    output_moments: Tensor,
    saved: Tensor,
    alpha: float,
    penalty: float,
    direction: str,
    eps: float,
    need_pre: bool,
    need_ft: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dlogits_pre, dL/dlogits_ft, dL/dmu (...)) from the gradients of the outputs, None standing for zero.

    The outputs that a kernel would use again (strength, kl, output_moments, saved) are not needed here.
    """
    rows = row_values(logits_pre, logits_ft, alpha, direction)
    p, delta, zero = rows.p, rows.delta, rows.kl.new_zeros(rows.kl.shape)
    n = d = None
    if labels is not None:
        used = (labels >= 0) & (labels < p.shape[-1]) & ~rows.invalid
        n, d, _ = (m.masked_fill(~used, 0.0) for m in label_moments(rows, labels).unbind(-1))
        grad_star = torch.where(used, grad_mu_star, 0.0) if grad_mu_star is not None else zero
    self_strength = mu is None and labels is not None
    strength = n / (d + eps) if self_strength else (mu if mu is not None else zero.new_ones(())).to(zero)
    strength = strength.expand(zero.shape).masked_fill(rows.invalid, 0.0)
    grad_strength = zero if grad_mu is None else grad_mu.masked_fill(rows.invalid, 0.0)
    h = torch.zeros_like(p)
    if grad_logprobs is not None:
        zs = steered_logits(rows, strength, penalty)
        grad_logprobs = torch.where((zs > -math.inf) & ~rows.invalid[..., None], grad_logprobs, 0.0)
        h = grad_logprobs - torch.softmax(zs, -1) * grad_logprobs.sum(-1, keepdim=True)
        grad_strength = grad_strength + _through_steer(rows, h, strength, penalty)
    u, w = strength[..., None] * h, torch.zeros_like(p)
    if labels is not None:
        if self_strength:
            grad_star = grad_star + torch.where(used, grad_strength, 0.0)
            grad_strength = zero
        g_n, g_d, g_h = grad_moments.unbind(-1) if grad_moments is not None else (zero, zero, zero)
        g_n = (g_n + grad_star / (d + eps)).masked_fill(~used, 0.0)[..., None]
        g_d = (g_d - grad_star * n / (d + eps).square()).masked_fill(~used, 0.0)[..., None]
        g_h = g_h.masked_fill(~used, 0.0)[..., None]
        mean = torch.where(rows.kept, p * delta, 0.0).sum(-1, keepdim=True)
        one_hot = torch.zeros_like(p).scatter_(-1, torch.where(used, labels, 0).long()[..., None], 1.0)
        u = u + g_n * (one_hot - p) + 2 * g_d * delta + 2 * g_h * p * (delta - mean)
        w = w - g_n * delta + g_h * delta * (delta - 2 * mean)
    grads = _through_delta(rows, logits_pre, direction, h, u, w, grad_kl)
    return (*_in_dtypes(grads, (logits_pre, logits_ft), (need_pre, need_ft)), grad_strength)


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
    """(dL/dlogits_pre, dL/dlogits_ft, dL/dmu (M,)) of NLL_m = lse(zs_m) - zs_m[label], from grad_nll (..., M)."""
    rows = row_values(logits_pre, logits_ft, alpha, direction)
    used = (labels != IGNORE_INDEX) & ~rows.invalid
    label = torch.where(used, labels, 0).long()[..., None]
    h_sum, u, grad_mu = torch.zeros_like(rows.p), torch.zeros_like(rows.p), []
    for m, strength in enumerate(mu.to(rows.z).unbind()):
        zs = steered_logits(rows, strength, penalty)
        reachable = used & (zs.gather(-1, label).squeeze(-1) > -math.inf)  # an NLL of +inf is a constant
        grad = torch.where(reachable, grad_nll[..., m], 0.0)[..., None]
        h = grad * torch.softmax(zs, -1).scatter_add(-1, label, -torch.ones_like(grad))
        h_sum, u = h_sum + h, u + strength * h
        grad_mu.append(_through_steer(rows, h, strength, penalty).sum())
    grads = _through_delta(rows, logits_pre, direction, h_sum, u, torch.zeros_like(u), None)
    grad_mu = torch.stack(grad_mu) if grad_mu else rows.kl.new_zeros(0)
    return (*_in_dtypes(grads, (logits_pre, logits_ft), (need_pre, need_ft)), grad_mu)


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
    rows = row_values(logits_pre, logits_ft, alpha, direction)
    zero = torch.zeros_like(rows.p)
    grads = _through_delta(rows, logits_pre, direction, zero, grad_delta.to(zero), zero, None)
    return _in_dtypes(grads, (logits_pre, logits_ft), (need_pre, need_ft))
