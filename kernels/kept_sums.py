"""Second pass: the sums over the kept tokens, from the tiles that hold one.

Delta is summed relative to r, the top token's: where one token has nearly all the mass, N and H are small differences of large
numbers, and with x = delta - r they are sums of small ones. With X = sum_K p x and Q = 1 - sum_K p (itself a sum over the
tokens outside K):

    sum_K p delta = X + r (1 - Q)
    N = (delta_y or 0) - r - X + r Q          H = sum_K p x^2 - X^2 + 2 r X Q + r^2 Q (1 - Q)
"""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode.constants import IGNORE_INDEX
from svdecode.kernels.row_algebra import (
    MAX,
    NEG_INF,
    SPLIT_FIELDS,
    TILE_FIELDS,
    TILE_MAX,
    TILE_TOTAL,
    TOTAL,
    add_totals,
    finite_or_zero,
    scale_to,
    shift_outside,
    steered,
    steering,
    top_delta,
)
from svdecode.kernels.row_layout import row_start
from svdecode.kernels.row_statistics import load_field, load_label, load_tile, merge_row
from svdecode.kernels.settings import COMPILED_ROW

COUNT, OUTSIDE, MEAN, SQUARES, WEIGHTED_SQUARES, STEERED_MAX, STEERED_TOTAL = (tl.constexpr(i) for i in range(7))
ROW_TOTAL, ROW_PRE_TOP, ROW_CENTRE, ROW_MU = (
    tl.constexpr(i) for i in range(7, 11)
)  # the row's, for the pass that follows
KEPT_FIELDS = tl.constexpr(11)

NUMBER, PER_ROW, OWN = (tl.constexpr(i) for i in range(3))  # where a row's mu comes from
IGNORE = tl.constexpr(IGNORE_INDEX)


@triton.jit
def kept_field(kept_fields, FIELD: tl.constexpr, kept, num_splits, SPLITS: tl.constexpr):
    """Sum over the splits of a row, in their order, of a kept sum; splits without a kept token hold nothing."""
    return tl.sum(tl.where(kept, load_field(kept_fields, FIELD, num_splits, 0.0, SPLITS), 0.0), 0)


@triton.jit
def outside_mass(kept_fields, kept, maxima, fields, num_splits, row, SPLITS: tl.constexpr):
    """Q: the mass outside K, of the kept splits from their sums, of the others from their statistics."""
    maximum, total, _pre_top, _centre = row
    totals = load_field(fields, TOTAL, num_splits, 0.0, SPLITS)
    others = tl.where(kept, 0.0, totals * scale_to(maxima, maximum))
    return kept_field(kept_fields, OUTSIDE, kept, num_splits, SPLITS) + tl.sum(others, 0) / total


@triton.jit
def label_moments(
    kept_fields, kept, maxima, fields, num_splits, pre_row, ft_row, label, threshold, row, vocabulary,
    KL_DIRECTION: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """(N, D, H, sum_K p delta) of a row (method, section 2), from its kept sums and the label's own delta."""
    r = top_delta(row, KL_DIRECTION)
    q = outside_mass(kept_fields, kept, maxima, fields, num_splits, row, SPLITS)
    mean = kept_field(kept_fields, MEAN, kept, num_splits, SPLITS)
    squares = kept_field(kept_fields, SQUARES, kept, num_splits, SPLITS)
    weighted = kept_field(kept_fields, WEIGHTED_SQUARES, kept, num_splits, SPLITS)
    in_range, z, a = load_label(pre_row, ft_row, label, vocabulary)
    _u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
    outside = tl.where(label == IGNORE, 0.0, float("nan"))  # an out-of-range label shows as NaN
    n = tl.where(in_range, tl.where(z >= threshold, delta, 0.0) - r - mean + r * q, outside)
    d = tl.where(in_range, squares, outside)
    variance = weighted - mean * mean + 2 * r * mean * q + r * r * q * (1 - q)
    h = tl.where(in_range, tl.maximum(variance, 0.0), outside)
    return n, d, h, mean + r * (1 - q)


@triton.jit
def optimal_mu(n, d, label, eps):
    """mu* = N / (D + eps), 0 for an ignored label whatever eps is."""
    return tl.where(label == IGNORE, 0.0, n / (d + eps))


@triton.jit
def kept_sums_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    splits_ptr,
    kept_ptr,
    mu_ptr,
    label_ptr,
    out_ptr,
    mu_number,
    log_alpha,
    penalty,
    eps,
    vocabulary,
    num_splits,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    SUMS: tl.constexpr,
    STEER: tl.constexpr,
    FILL: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store one split's kept sums (SUMS) and its part of the steered normaliser (STEER).

    A split without a kept token stores nothing; with FILL its log-probs are written here, since they are all -inf.
    """
    program = tl.program_id(0)
    row_index = program // num_splits
    split = program % num_splits
    row64 = row_index.to(tl.int64)
    fields = splits_ptr + row64 * (SPLIT_FIELDS * num_splits)
    maxima = load_field(fields, MAX, num_splits, NEG_INF, SPLITS)
    maximum = tl.max(maxima, 0)
    threshold = maximum + log_alpha
    own_max = tl.load(fields + MAX * num_splits + split)
    sizes, pre_strides, ft_strides, out_strides = layout
    if own_max >= threshold:
        total, pre_top, centre, valid = merge_row(fields, num_splits, SPLITS)
        row = (maximum, total, pre_top, centre)
        pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
        ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)
        kept_fields = kept_ptr + row64 * (KEPT_FIELDS * num_splits)
        own_fields = kept_fields + split
        mu = mu_number
        if MU == PER_ROW:
            mu = tl.load(mu_ptr + row_index)
        if MU == OWN and STEER:
            label = tl.load(label_ptr + row_index)
            n, d, _h, _mean = label_moments(
                kept_fields, maxima >= threshold, maxima, fields, num_splits, pre_row, ft_row, label, threshold, row,
                vocabulary, KL_DIRECTION, SPLITS,
            )  # fmt: skip
            mu = optimal_mu(n, d, label, eps)
        shift = shift_outside(mu, penalty, DROP)
        r = top_delta(row, KL_DIRECTION)
        own_scale = scale_to(own_max, maximum)
        tiles = tiles_ptr + row64 * (TILE_FIELDS * num_splits * TILES)

        count = 0
        outside = 0.0
        mean = 0.0
        squares = 0.0
        weighted = 0.0
        steered_max = float("-inf")
        steered_total = 0.0
        for i in range(TILES):
            tile = split * TILES + i
            if tl.load(tiles + TILE_MAX * num_splits * TILES + tile) >= threshold:
                _token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, TILE)
                keep = (z >= threshold) & inside
                u, p, _c, delta = steering(z, a, row, KL_DIRECTION)
                if SUMS:
                    x = tl.where(keep, delta - r, 0.0)
                    count += tl.sum(keep.to(tl.int32), 0)
                    outside += tl.sum(tl.where(keep, 0.0, p), 0)
                    mean += tl.sum(p * x, 0)
                    squares += tl.sum(tl.where(keep, delta * delta, 0.0), 0)
                    weighted += tl.sum(p * x * x, 0)
                if STEER:
                    zs = steered(u, delta, keep, mu, shift)
                    tile_max = tl.max(zs, 0)
                    tile_total = tl.sum(tl.exp(zs - finite_or_zero(tile_max)), 0)
                    steered_max, steered_total = add_totals(steered_max, steered_total, tile_max, tile_total)
            else:
                # A tile without a kept token enters as it is: no difference of masses, nothing cancels.
                mass = tl.load(tiles + TILE_TOTAL * num_splits * TILES + tile)
                if SUMS:
                    outside += mass * own_scale / total
                if STEER and not DROP:
                    steered_max, steered_total = add_totals(steered_max, steered_total, own_max - maximum + shift, mass)
        if SUMS:
            tl.store(own_fields + COUNT * num_splits, count.to(tl.float32))
            tl.store(own_fields + OUTSIDE * num_splits, outside)
            tl.store(own_fields + MEAN * num_splits, mean)
            tl.store(own_fields + SQUARES * num_splits, squares)
            tl.store(own_fields + WEIGHTED_SQUARES * num_splits, weighted)
        if STEER:
            tl.store(own_fields + STEERED_MAX * num_splits, steered_max)
            tl.store(own_fields + STEERED_TOTAL * num_splits, steered_total)
            tl.store(own_fields + ROW_TOTAL * num_splits, tl.where(valid, total, float("nan")))
            tl.store(own_fields + ROW_PRE_TOP * num_splits, pre_top)
            tl.store(own_fields + ROW_CENTRE * num_splits, centre)
            tl.store(own_fields + ROW_MU * num_splits, mu)
    elif FILL:
        out_row = out_ptr + row_start(row_index, sizes, out_strides)
        for i in range(TILES):
            token = (split * TILES + i) * TILE + tl.arange(0, TILE)
            tl.store(out_row + token, tl.full([TILE], float("-inf"), tl.float32), mask=token < vocabulary)


KERNEL_VARIANTS = [
    (
        kept_sums_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (0,), "SUMS": (True,), "STEER": (True,), "FILL": (True,)}
        | COMPILED_ROW,
        3,
    ),
    (
        kept_sums_kernel,
        {"KL_DIRECTION": (False,), "DROP": (True,), "MU": (2,), "SUMS": (False,), "STEER": (True,), "FILL": (True,)}
        | COMPILED_ROW,
        3,
    ),
]
