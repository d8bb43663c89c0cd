"""What the gradients of a row's tokens share: sums of the incoming gradient, dL/dmu, and dL/dN, dL/dD, dL/dH.

The forward of the row is not repeated: `saved_row` reads what it saved. See `backward.py` for the equations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode.kernels.fused_steer import (
    SAVED_CENTRE,
    SAVED_FIELDS,
    SAVED_MAXIMUM,
    SAVED_MEAN,
    SAVED_NORMALISER,
    SAVED_PRE_TOP,
    SAVED_TOTAL,
)
from svdecode.kernels.row_algebra import NEG_INF, shift_outside, steered, steering
from svdecode.kernels.row_layout import row_start
from svdecode.kernels.row_statistics import load_field, load_label
from svdecode.kernels.settings import COMPILED_BLOCKS, TILE

G_SUM, G_DELTA, PS_DELTA, G_OUTSIDE, PS_OUTSIDE = (tl.constexpr(i) for i in range(5))
GRADIENT_FIELDS = tl.constexpr(5)
COEF_G, COEF_N, COEF_D, COEF_H, COEF_KL = (tl.constexpr(i) for i in range(5))
COEFFICIENTS = tl.constexpr(5)


@triton.jit
def saved_row(saved_ptr, row64, log_alpha):
    """((maximum, total, pre_top, centre), threshold, normaliser, sum_K p delta) of a row; total is NaN for an invalid row."""
    saved = saved_ptr + row64 * SAVED_FIELDS
    maximum = tl.load(saved + SAVED_MAXIMUM)
    row = (maximum, tl.load(saved + SAVED_TOTAL), tl.load(saved + SAVED_PRE_TOP), tl.load(saved + SAVED_CENTRE))
    return row, maximum + log_alpha, tl.load(saved + SAVED_NORMALISER), tl.load(saved + SAVED_MEAN)


@triton.jit
def steer_gradient_sums_kernel(
    pre_ptr,
    ft_ptr,
    grad_ptr,
    saved_ptr,
    mu_ptr,
    sums_ptr,
    log_alpha,
    penalty,
    vocabulary,
    num_splits,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store one split's sums of g = dL/dlogprobs: all of it, g delta and softmax(zs) delta on K, both outside K."""
    program = tl.program_id(0)
    row_index = program // num_splits
    split = program % num_splits
    row64 = row_index.to(tl.int64)
    row, threshold, normaliser, _mean = saved_row(saved_ptr, row64, log_alpha)
    mu = tl.load(mu_ptr + row_index)
    shift = shift_outside(mu, penalty, DROP)
    sizes, pre_strides, ft_strides, grad_strides = layout
    pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
    ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)
    grad_row = grad_ptr + row_start(row_index, sizes, grad_strides)
    g_sum = 0.0
    g_delta = 0.0
    ps_delta = 0.0
    g_outside = 0.0
    ps_outside = 0.0
    for i in range(TILES):
        token = (split * TILES + i) * TILE + tl.arange(0, TILE)
        inside = token < vocabulary
        z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
        if (not DROP) or (tl.max(z, 0) >= threshold):
            a = tl.load(pre_row + token, mask=inside, other=NEG_INF).to(tl.float32)
            keep = (z >= threshold) & inside
            u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
            zs = steered(u, delta, keep, mu, shift)
            reachable = (zs > NEG_INF) & inside
            if DROP:  # few tokens: predicated loads of single elements
                g = tl.load(grad_row + token, mask=keep, other=0.0)
            else:
                g = tl.load(grad_row + token, mask=inside, other=0.0)
            g = tl.where(reachable, g, 0.0)
            ps = tl.where(reachable, tl.exp(zs - normaliser), 0.0)
            g_sum += tl.sum(g, 0)
            g_delta += tl.sum(tl.where(keep, g * delta, 0.0), 0)
            ps_delta += tl.sum(tl.where(keep, ps * delta, 0.0), 0)
            if not DROP:
                g_outside += tl.sum(tl.where(keep, 0.0, g), 0)
                ps_outside += tl.sum(tl.where(keep, 0.0, ps), 0)
    own = sums_ptr + row64 * (GRADIENT_FIELDS * num_splits) + split
    tl.store(own + G_SUM * num_splits, g_sum)
    tl.store(own + G_DELTA * num_splits, g_delta)
    tl.store(own + PS_DELTA * num_splits, ps_delta)
    tl.store(own + G_OUTSIDE * num_splits, g_outside)
    tl.store(own + PS_OUTSIDE * num_splits, ps_outside)


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def gradient_coefficients_kernel(
    sums_ptr,
    saved_ptr,
    mu_ptr,
    label_ptr,
    moments_ptr,
    kl_ptr,
    grad_mu_ptr,
    grad_kl_ptr,
    grad_mu_star_ptr,
    grad_moments_ptr,
    coefficients_out_ptr,
    grad_mu_out_ptr,
    penalty,
    eps,
    num_splits,
    DROP: tl.constexpr,
    DENSE: tl.constexpr,
    OWN_STRENGTH: tl.constexpr,
    LABELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store what one row's gradients share: sum g, dL/dN, dL/dD, dL/dH, dL/dKL; and dL/dmu."""
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    valid = tl.load(saved_ptr + row64 * SAVED_FIELDS + SAVED_TOTAL) > 0
    grad_mu = 0.0
    if grad_mu_ptr is not None:
        grad_mu = tl.load(grad_mu_ptr + row)
    g_sum = 0.0
    if DENSE:
        sums = sums_ptr + row64 * (GRADIENT_FIELDS * num_splits)
        g_sum = tl.sum(load_field(sums, G_SUM, num_splits, 0.0, SPLITS), 0)
        g_delta = tl.sum(load_field(sums, G_DELTA, num_splits, 0.0, SPLITS), 0)
        ps_delta = tl.sum(load_field(sums, PS_DELTA, num_splits, 0.0, SPLITS), 0)
        grad_mu += g_delta - g_sum * ps_delta
        if not DROP:
            g_outside = tl.sum(load_field(sums, G_OUTSIDE, num_splits, 0.0, SPLITS), 0)
            ps_outside = tl.sum(load_field(sums, PS_OUTSIDE, num_splits, 0.0, SPLITS), 0)
            grad_mu += sign(tl.load(mu_ptr + row)) * penalty * (g_outside - g_sum * ps_outside)
    grad_n = 0.0
    grad_d = 0.0
    grad_h = 0.0
    if LABELS:
        used = valid & (tl.load(label_ptr + row) >= 0)
        n = tl.load(moments_ptr + row64 * 3)
        d = tl.load(moments_ptr + row64 * 3 + 1)
        used = used & (n == n)
        grad_star = 0.0
        if grad_mu_star_ptr is not None:
            grad_star = tl.load(grad_mu_star_ptr + row)
        if OWN_STRENGTH:
            grad_star += grad_mu
            grad_mu = 0.0
        grad_n = grad_star / (d + eps)
        grad_d = -grad_star * n / ((d + eps) * (d + eps))
        if grad_moments_ptr is not None:
            grad_n += tl.load(grad_moments_ptr + row64 * 3)
            grad_d += tl.load(grad_moments_ptr + row64 * 3 + 1)
            grad_h += tl.load(grad_moments_ptr + row64 * 3 + 2)
        grad_n = tl.where(used, grad_n, 0.0)
        grad_d = tl.where(used, grad_d, 0.0)
        grad_h = tl.where(used, grad_h, 0.0)
    grad_kl = 0.0
    if grad_kl_ptr is not None:
        grad_kl = tl.where(tl.load(kl_ptr + row) < float("inf"), tl.load(grad_kl_ptr + row), 0.0)
    coefficients = coefficients_out_ptr + row64 * COEFFICIENTS
    tl.store(coefficients + COEF_G, g_sum)
    tl.store(coefficients + COEF_N, grad_n)
    tl.store(coefficients + COEF_D, grad_d)
    tl.store(coefficients + COEF_H, grad_h)
    tl.store(coefficients + COEF_KL, grad_kl)
    tl.store(grad_mu_out_ptr + row, tl.where(valid, grad_mu, 0.0))


@triton.jit
def nll_normaliser(nll, label_u, label_delta, label_kept, mu, shift):
    """(normaliser, reachable) of zs at one strength, from the NLL: lse(zs) = NLL + zs_label; an NLL of +inf is a constant."""
    label_zs = steered(label_u, label_delta, label_kept, mu, shift)
    reachable = label_zs > NEG_INF
    return nll + tl.where(reachable, label_zs, 0.0), reachable


@triton.jit
def strength_gradient_kernel(
    pre_ptr,
    ft_ptr,
    grad_ptr,
    saved_ptr,
    mu_ptr,
    label_ptr,
    nll_ptr,
    grad_mu_out_ptr,
    log_alpha,
    penalty,
    vocabulary,
    num_strengths,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store one row's part of dL/dmu_m: G_m (<softmax(zs), delta>_K - delta_y), and the slope of the penalty outside K."""
    row_index = tl.program_id(0)
    m = tl.program_id(1)
    row64 = row_index.to(tl.int64)
    row, threshold, _normaliser, _mean = saved_row(saved_ptr, row64, log_alpha)
    _maximum, total, _pre_top, _centre = row
    mu = tl.load(mu_ptr + m)
    shift = shift_outside(mu, penalty, DROP)
    sizes, pre_strides, ft_strides = layout
    pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
    ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)
    label = tl.load(label_ptr + row_index)
    in_range, label_z, label_a = load_label(pre_row, ft_row, label, vocabulary)
    label_rel, _label_p, _label_c, label_delta = steering(label_z, label_a, row, KL_DIRECTION)
    nll = tl.load(nll_ptr + row64 * num_strengths + m)
    lse, reachable = nll_normaliser(nll, label_rel, label_delta, label_z >= threshold, mu, shift)
    inner = 0.0
    kept_mass = 0.0
    for tile in range((vocabulary + TILE - 1) // TILE):
        token = tile * TILE + tl.arange(0, TILE)
        inside = token < vocabulary
        z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
        if tl.max(z, 0) >= threshold:
            a = tl.load(pre_row + token, mask=inside, other=NEG_INF).to(tl.float32)
            rel, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
            keep = (z >= threshold) & inside
            ps = tl.where(keep, tl.exp(steered(rel, delta, keep, mu, shift) - lse), 0.0)
            inner += tl.sum(ps * delta, 0)
            kept_mass += tl.sum(ps, 0)
    label_kept = label_z >= threshold
    slope = inner - tl.where(label_kept, label_delta, 0.0)
    if not DROP:
        slope += sign(mu) * penalty * (1.0 - kept_mass - tl.where(label_kept, 0.0, 1.0))
    grad = tl.load(grad_ptr + row64 * num_strengths + m)
    used = reachable & in_range & (total > 0)
    tl.store(grad_mu_out_ptr + row64 * num_strengths + m, tl.where(used, grad * slope, 0.0))


KERNEL_VARIANTS = [
    (steer_gradient_sums_kernel, {"KL_DIRECTION": (True,), "DROP": (True, False)} | COMPILED_BLOCKS, 3),
    (
        gradient_coefficients_kernel,
        {"DROP": (False,), "DENSE": (True,), "OWN_STRENGTH": (True,), "LABELS": (True,), "SPLITS": (32,)},
        0,
    ),
    (strength_gradient_kernel, {"KL_DIRECTION": (True,), "DROP": (False,), "TILE": (TILE,)}, 2),
]
