"""The gradients of a row's tokens, dL/dlogits_pre and dL/dlogits_ft: one pass that sums over K, one that writes.

MODE says where h = dL/dzs, u = dL/ddelta and w = dL/dp come from; see `backward.py` for the equations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode.kernels.gradient_sums import (
    COEF_D,
    COEF_G,
    COEF_H,
    COEF_KL,
    COEF_N,
    COEFFICIENTS,
    nll_normaliser,
    saved_row,
)
from svdecode.kernels.kept_sums import IGNORE
from svdecode.kernels.row_algebra import NEG_INF, difference_from_top, shift_outside, steered, steering
from svdecode.kernels.row_layout import row_start
from svdecode.kernels.row_statistics import load_field, load_label, load_tile
from svdecode.kernels.settings import COMPILED_BLOCKS

STEER, NLL, VECTOR = (tl.constexpr(i) for i in range(3))


@triton.jit
def token_gradients(
    token, inside, z, a, row_index, row, threshold, normaliser, mean, coefficients_ptr, grad_row, mu_ptr, label_ptr, nll_ptr,
    label_z, label_a, penalty, num_strengths,
    KL_DIRECTION: tl.constexpr, DROP: tl.constexpr, MODE: tl.constexpr, DENSE: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """(p, c, h, dL/dc, w + [u c]) of the tokens of a tile."""
    row64 = row_index.to(tl.int64)
    keep = (z >= threshold) & inside
    rel, p, c, delta = steering(z, a, row, KL_DIRECTION)
    h = tl.zeros_like(z)
    u = tl.zeros_like(z)
    w = tl.zeros_like(z)
    if MODE == VECTOR:
        u = tl.load(grad_row + token, mask=keep, other=0.0)
    elif MODE == NLL:
        label = tl.load(label_ptr + row_index)
        label_rel, _label_p, _label_c, label_delta = steering(label_z, label_a, row, KL_DIRECTION)
        for m in range(num_strengths):
            mu = tl.load(mu_ptr + m)
            shift = shift_outside(mu, penalty, DROP)
            nll = tl.load(nll_ptr + row64 * num_strengths + m)
            lse, reachable = nll_normaliser(nll, label_rel, label_delta, label_z >= threshold, mu, shift)
            grad = tl.load(grad_row + m)
            grad = tl.where(reachable & (label != IGNORE), grad, 0.0)
            zs = steered(rel, delta, keep, mu, shift)
            ps = tl.where((zs > NEG_INF) & inside, tl.exp(zs - lse), 0.0)
            one = grad * (ps - (token == label).to(tl.float32))
            h += one
            u += mu * one
    else:
        coefficients = coefficients_ptr + row64 * COEFFICIENTS
        if DENSE:
            mu = tl.load(mu_ptr + row_index)
            shift = shift_outside(mu, penalty, DROP)
            zs = steered(rel, delta, keep, mu, shift)
            reachable = (zs > NEG_INF) & inside
            if DROP:  # few tokens: predicated loads of single elements
                g = tl.load(grad_row + token, mask=keep, other=0.0)
            else:
                g = tl.load(grad_row + token, mask=inside, other=0.0)
            g = tl.where(reachable, g, 0.0)
            h = g - tl.where(reachable, tl.exp(zs - normaliser), 0.0) * tl.load(coefficients + COEF_G)
            u = mu * h
        if LABELS:
            grad_n = tl.load(coefficients + COEF_N)
            grad_h = tl.load(coefficients + COEF_H)
            is_label = (token == tl.load(label_ptr + row_index)).to(tl.float32)
            u += grad_n * (is_label - p) + 2 * tl.load(coefficients + COEF_D) * delta + 2 * grad_h * p * (delta - mean)
            w = -grad_n * delta + grad_h * delta * (delta - 2 * mean)
    u = tl.where(keep & (a > NEG_INF) & (z > NEG_INF), u, 0.0)
    w = tl.where(keep, w, 0.0)
    if KL_DIRECTION:
        grad_c = u * p
        w += u * c
    else:
        grad_c = u
    return p, c, h, grad_c, w


@triton.jit
def delta_gradient_sums_kernel(
    pre_ptr,
    ft_ptr,
    grad_ptr,
    saved_ptr,
    coefficients_ptr,
    mu_ptr,
    label_ptr,
    nll_ptr,
    sums_ptr,
    log_alpha,
    penalty,
    vocabulary,
    num_splits,
    num_strengths,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MODE: tl.constexpr,
    DENSE: tl.constexpr,
    LABELS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store one split's sum of dL/dc and of p w."""
    program = tl.program_id(0)
    row_index = program // num_splits
    split = program % num_splits
    row64 = row_index.to(tl.int64)
    row, threshold, normaliser, mean = saved_row(saved_ptr, row64, log_alpha)
    sizes, pre_strides, ft_strides, grad_strides = layout
    pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
    ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)
    grad_row = grad_ptr
    if MODE == NLL:
        grad_row = grad_ptr + row64 * num_strengths
    elif DENSE:
        grad_row = grad_ptr + row_start(row_index, sizes, grad_strides)
    label_z = NEG_INF + 0.0
    label_a = NEG_INF + 0.0
    if MODE == NLL:
        _in_range, label_z, label_a = load_label(pre_row, ft_row, tl.load(label_ptr + row_index), vocabulary)
    grad_c_sum = 0.0
    pw_sum = 0.0
    for i in range(TILES):
        token = (split * TILES + i) * TILE + tl.arange(0, TILE)
        inside = token < vocabulary
        z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
        if tl.max(z, 0) >= threshold:
            a = tl.load(pre_row + token, mask=inside, other=NEG_INF).to(tl.float32)
            p, _c, _h, grad_c, w = token_gradients(
                token, inside, z, a, row_index, row, threshold, normaliser, mean, coefficients_ptr, grad_row, mu_ptr,
                label_ptr, nll_ptr, label_z, label_a, penalty, num_strengths, KL_DIRECTION, DROP, MODE, DENSE, LABELS,
            )  # fmt: skip
            grad_c_sum += tl.sum(grad_c, 0)
            pw_sum += tl.sum(p * w, 0)
    own = sums_ptr + row64 * (2 * num_splits) + split
    tl.store(own, grad_c_sum)
    tl.store(own + num_splits, pw_sum)


@triton.jit
def logits_gradient_kernel(
    pre_ptr,
    ft_ptr,
    grad_ptr,
    saved_ptr,
    coefficients_ptr,
    mu_ptr,
    label_ptr,
    nll_ptr,
    sums_ptr,
    kl_ptr,
    pre_grad_out_ptr,
    ft_grad_out_ptr,
    log_alpha,
    penalty,
    vocabulary,
    num_splits,
    num_strengths,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MODE: tl.constexpr,
    DENSE: tl.constexpr,
    LABELS: tl.constexpr,
    GRAD_KL: tl.constexpr,
    NEED_PRE: tl.constexpr,
    NEED_FT: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write dL/dlogits_pre and dL/dlogits_ft of one split; zeros in a row that is not valid."""
    program = tl.program_id(0)
    row_index = program // num_splits
    split = program % num_splits
    row64 = row_index.to(tl.int64)
    row, threshold, normaliser, mean = saved_row(saved_ptr, row64, log_alpha)
    maximum, total, pre_top, centre = row
    sizes, pre_strides, ft_strides, grad_strides = layout
    pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
    ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)
    grad_row = grad_ptr
    if MODE == NLL:
        grad_row = grad_ptr + row64 * num_strengths
    elif DENSE:
        grad_row = grad_ptr + row_start(row_index, sizes, grad_strides)
    label_z = NEG_INF + 0.0
    label_a = NEG_INF + 0.0
    if MODE == NLL:
        _in_range, label_z, label_a = load_label(pre_row, ft_row, tl.load(label_ptr + row_index), vocabulary)
    sums = sums_ptr + row64 * (2 * num_splits)
    s = -tl.sum(load_field(sums, 0, num_splits, 0.0, SPLITS), 0)
    pq = tl.sum(load_field(sums, 1, num_splits, 0.0, SPLITS), 0)  # <p, d - dbar> = 0: s adds nothing
    grad_kl = 0.0
    log_pre_total = 0.0
    if GRAD_KL:
        grad_kl = tl.load(coefficients_ptr + row64 * COEFFICIENTS + COEF_KL)
        log_pre_total = tl.load(kl_ptr + row_index) - centre + tl.log(total)  # lse(a) - pre_top
    valid = total > 0
    for i in range(TILES):
        token, inside, z, a = load_tile(pre_row, ft_row, split * TILES + i, vocabulary, TILE)
        p, c, h, grad_c, w = token_gradients(
            token, inside, z, a, row_index, row, threshold, normaliser, mean, coefficients_ptr, grad_row, mu_ptr,
            label_ptr, nll_ptr, label_z, label_a, penalty, num_strengths, KL_DIRECTION, DROP, MODE, DENSE, LABELS,
        )  # fmt: skip
        has_both = (a > NEG_INF) & (z > NEG_INF)
        grad_d = tl.where(has_both, grad_c + s * p, 0.0)
        if NEED_FT:
            d = difference_from_top(z, a, maximum, pre_top) - centre
            grad_z = h + grad_d + tl.where(z > NEG_INF, p * (w + s * d - pq), 0.0)
            if GRAD_KL:
                grad_z += tl.where(grad_kl != 0, grad_kl * p * c, 0.0)
            grad_z = tl.where(valid, grad_z, 0.0)
            tl.store(ft_grad_out_ptr + row64 * vocabulary + token, grad_z, mask=inside)
        if NEED_PRE:
            grad_a = -grad_d
            if GRAD_KL:
                pre_p = tl.exp(a - pre_top - log_pre_total)
                grad_a += tl.where(grad_kl != 0, grad_kl * (pre_p - p), 0.0)
            grad_a = tl.where(valid, grad_a, 0.0)
            tl.store(pre_grad_out_ptr + row64 * vocabulary + token, grad_a, mask=inside)


_MODES = [
    {"KL_DIRECTION": (True,), "DROP": (True, False), "MODE": (0,), "DENSE": (True,), "LABELS": (True,)},
    {"KL_DIRECTION": (True,), "DROP": (False,), "MODE": (1,), "DENSE": (False,), "LABELS": (False,)},
    {"KL_DIRECTION": (False,), "DROP": (True,), "MODE": (2,), "DENSE": (True,), "LABELS": (False,)},
]
KERNEL_VARIANTS = [
    *((delta_gradient_sums_kernel, mode | COMPILED_BLOCKS, 3) for mode in _MODES),
    *(
        (
            logits_gradient_kernel,
            mode | {"GRAD_KL": (True,), "NEED_PRE": (True,), "NEED_FT": (True,), "SPLITS": (32,)} | COMPILED_BLOCKS,
            3,
        )
        for mode in _MODES
    ),
]
