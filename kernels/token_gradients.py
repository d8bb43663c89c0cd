"""The gradients of a tile's tokens in zs, delta and p, and what the two launches that use them share.

MODE says where h = dL/dzs, u = dL/ddelta and w = dL/dp come from; see `backward.py` for the equations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode.kernels.gradient_sums import COEF_D, COEF_G, COEF_H, COEF_N, nll_normaliser
from svdecode.kernels.kept_sums import IGNORE
from svdecode.kernels.row_algebra import NEG_INF, exponential, shift_outside, steered, steering
from svdecode.kernels.row_layout import row_pointer
from svdecode.kernels.row_statistics import load_tile

STEER, NLL, VECTOR = (tl.constexpr(i) for i in range(3))


@triton.jit
def token_gradients(
    tile, pointers, given, row_index, row, threshold, normaliser, mean, num_strengths, vocabulary, penalty,
    KL_DIRECTION: tl.constexpr, DROP: tl.constexpr, MODE: tl.constexpr, DENSE: tl.constexpr, LABELS: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(token, inside, z, a, p, c, h, dL/dc, w + [u c]) of the tokens of a tile.

    `pointers` is (pre_row, ft_row, grad_row, record), `given` is (mu_ptr, label_ptr, nll_ptr, label_z, label_a).
    """
    pre_row, ft_row, grad_row, record = pointers
    mu_ptr, label_ptr, nll_ptr, label_z, label_a = given
    token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, ALIGN, TILE)
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
            nll = tl.load(nll_ptr + row_index.to(tl.int64) * num_strengths + m)
            lse, reachable = nll_normaliser(nll, label_rel, label_delta, label_z >= threshold, mu, shift)
            grad = tl.load(grad_row + m)
            grad = tl.where(reachable & (label != IGNORE), grad, 0.0)
            zs = steered(rel, delta, keep, mu, shift)
            ps = tl.where((zs > NEG_INF) & inside, exponential(zs - lse), 0.0)
            one = grad * (ps - (token == label).to(tl.float32))
            h += one
            u += mu * one
    else:
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
            h = g - tl.where(reachable, exponential(zs - normaliser), 0.0) * tl.load(record + COEF_G)
            u = mu * h
        if LABELS:
            grad_n = tl.load(record + COEF_N)
            grad_h = tl.load(record + COEF_H)
            is_label = (token == tl.load(label_ptr + row_index)).to(tl.float32)
            u += grad_n * (is_label - p) + 2 * tl.load(record + COEF_D) * delta + 2 * grad_h * p * (delta - mean)
            w = -grad_n * delta + grad_h * delta * (delta - 2 * mean)
    u = tl.where(keep & (a > NEG_INF) & (z > NEG_INF), u, 0.0)
    w = tl.where(keep, w, 0.0)
    if KL_DIRECTION:
        grad_c = u * p
        w += u * c
    else:
        grad_c = u
    return token, inside, z, a, p, c, h, grad_c, w


@triton.jit
def gradient_row(
    grad_ptr, unread, row_index, sizes, grad_strides, zero, num_strengths, MODE: tl.constexpr, DENSE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Pointer to a row's incoming gradient: of its strengths, or of its tokens; where there is none, to what nobody reads."""
    grad_row = unread
    if MODE == NLL:
        grad_row = grad_ptr + row_index.to(tl.int64) * num_strengths
    elif DENSE:
        grad_row = row_pointer(grad_ptr, row_index, sizes, grad_strides, zero, ALIGN)
    return grad_row
