"""Second launch: the sums over the kept tokens of each tile that holds one.

Delta is summed relative to r, the top token's: where one token has nearly all the mass, N and H are small differences of large
numbers, and with x = delta - r they are sums of small ones. With X = sum_K p x and Q = 1 - sum_K p (itself a sum over the
tokens outside K):

    sum_K p delta = X + r (1 - Q)
    N = (delta_y or 0) - r - X + r Q          H = sum_K p x^2 - X^2 + 2 r X Q + r^2 Q (1 - Q)

r is 0 where either model excludes the top token: its delta is 0 then.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode.constants import IGNORE_INDEX
from svdecode.kernels.held_row import FINISHED, HELD_TILES, ends_of, kept_of_slots, load_held
from svdecode.kernels.merged_row import (
    ROW_REST,
    ROW_TILES,
    ROW_TOP_DELTA,
    load_row,
    merge_row,
    store_row,
)
from svdecode.kernels.row_algebra import (
    NEG_INF,
    exponential,
    finite_or_zero,
    shift_outside,
    steered,
    steering,
    top_delta,
)
from svdecode.kernels.row_layout import logit_rows, row_pointer
from svdecode.kernels.row_statistics import (
    OWN_FIELDS,
    load_field,
    load_label,
    load_tile,
    next_tile,
    of_group,
    open_row,
    workspace_of,
)
from svdecode.kernels.saved_row import save_row
from svdecode.kernels.settings import UNSPECIALISED
from svdecode.kernels.variants import COMPILED_ROW, Variant

COUNT, OUTSIDE, MEAN, SQUARES, WEIGHTED_SQUARES, STEERED_MAX, STEERED_TOTAL = (
    tl.constexpr(OWN_FIELDS + i) for i in range(7)
)
NUMBER, PER_ROW, OWN = (tl.constexpr(i) for i in range(3))  # where a row's mu comes from
IGNORE = tl.constexpr(IGNORE_INDEX)


@triton.jit
def row_strength(mu_ptr, row, mu_number, MU: tl.constexpr):
    """mu of a row, but for its own mu_star, which takes the row's sums."""
    mu = mu_number
    if MU == PER_ROW:
        mu = tl.load(mu_ptr + row)
    return mu


@triton.jit
def kept_field(fields, FIELD: tl.constexpr, kept, WIDTH: tl.constexpr):
    """Sum of a kept sum over the tiles that have one, in their order."""
    return tl.sum(load_field(fields, FIELD, kept, 0.0, WIDTH), 0)


@triton.jit
def label_moments(
    record, fields, kept, pre_row, ft_row, label, threshold, row, vocabulary, KL_DIRECTION: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """(N, D, H, sum_K p delta) of a row (method, section 2), from its kept sums and the label's own delta."""
    r = tl.load(record + ROW_TOP_DELTA)
    q = kept_field(fields, OUTSIDE, kept, WIDTH) + tl.load(record + ROW_REST)
    mean = kept_field(fields, MEAN, kept, WIDTH)
    squares = kept_field(fields, SQUARES, kept, WIDTH)
    weighted = kept_field(fields, WEIGHTED_SQUARES, kept, WIDTH)
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


@triton.jit(do_not_specialize=UNSPECIALISED)
def kept_sums_kernel(
    pre_ptr,
    ft_ptr,
    workspace_ptr,
    mu_ptr,
    label_ptr,
    kl_out_ptr,
    out_ptr,
    mu_out_ptr,
    count_out_ptr,
    saved_out_ptr,
    mu_number,
    log_alpha,
    penalty,
    eps,
    vocabulary,
    num_tiles,
    group_size,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    SUMS: tl.constexpr,
    STEER: tl.constexpr,
    WITH_KL: tl.constexpr,
    FINISH: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the kept sums (SUMS) and the steered normaliser (STEER) of a group's tiles with kept tokens.

    With SUMS the first program of a row also merges it for the launches after, and stores the KL. With FINISH (a penalty of
    -inf, no labels) it stores all that is left of a valid row with few kept tokens; the launch after has nothing to do then.
    """
    row_index = tl.program_id(0)
    group = tl.program_id(1)
    record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    used, maxima, kept, threshold = open_row(fields, num_tiles, log_alpha, WIDTH)
    pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
    mu = row_strength(mu_ptr, row_index, mu_number, MU)
    finished = False
    if FINISH:
        first, last, number = ends_of(kept, WIDTH)
        if (number <= HELD_TILES) & (group == 0):
            start, z = load_held(ft_row, first, last, vocabulary, ALIGN, TILE)
            row, total, kl, _top_excluded, valid = merge_row(fields, used, maxima, WITH_KL, WIDTH)
            token, z, keep, alone = kept_of_slots(start, z, threshold)
            finished = alone & valid
            if finished:
                a = tl.load(pre_row + token, mask=keep, other=NEG_INF).to(tl.float32)
                u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
                zs = steered(u, delta, keep, mu, NEG_INF)
                top = tl.max(zs, 0)
                normaliser = top + tl.log(tl.sum(exponential(zs - finite_or_zero(top)), 0))
                out_row = row_pointer(out_ptr, row_index, layout[0], layout[3], zero, ALIGN)
                tl.store(out_row + token, zs - normaliser, mask=keep)
                tl.store(record + ROW_TILES, FINISHED)
                tl.store(mu_out_ptr + row_index, mu)
                tl.store(count_out_ptr + row_index, tl.sum(keep.to(tl.int32), 0))
                save_row(saved_out_ptr, row_index, row, total, normaliser, 0.0)
                if WITH_KL:
                    tl.store(kl_out_ptr + row_index, kl)
    if not finished:
        own = of_group(kept, group, group_size, WIDTH)
        tile = next_tile(own, 0, WIDTH)
        if (tile < WIDTH) | (SUMS and group == 0):
            if SUMS:
                row, total, kl, top_excluded, valid = merge_row(fields, used, maxima, WITH_KL, WIDTH)
                r = tl.where(top_excluded, 0.0, top_delta(row, KL_DIRECTION))
                if group == 0:
                    store_row(record, fields, used, kept, maxima, row, total, top_excluded, valid, KL_DIRECTION, WIDTH)
                    if WITH_KL:
                        tl.store(kl_out_ptr + row_index, tl.where(valid, kl, float("nan")))
            else:
                row, _total = load_row(record)
                r = 0.0
                if MU == OWN:
                    label = tl.load(label_ptr + row_index)
                    n, d, _h, _mean = label_moments(
                        record, fields, kept, pre_row, ft_row, label, threshold, row, vocabulary, KL_DIRECTION, WIDTH
                    )
                    mu = optimal_mu(n, d, label, eps)
            shift = shift_outside(mu, penalty, DROP)
            while tile < WIDTH:
                _token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, ALIGN, TILE)
                keep = (z >= threshold) & inside
                u, p, _c, delta = steering(z, a, row, KL_DIRECTION)
                if SUMS:
                    x = tl.where(keep, delta - r, 0.0)
                    px = p * x
                    tl.store(fields + COUNT * WIDTH + tile, tl.sum(keep.to(tl.float32), 0))
                    tl.store(fields + OUTSIDE * WIDTH + tile, tl.sum(tl.where(keep, 0.0, p), 0))
                    tl.store(fields + MEAN * WIDTH + tile, tl.sum(px, 0))
                    tl.store(fields + SQUARES * WIDTH + tile, tl.sum(tl.where(keep, delta * delta, 0.0), 0))
                    tl.store(fields + WEIGHTED_SQUARES * WIDTH + tile, tl.sum(px * x, 0))
                if STEER:
                    zs = steered(u, delta, keep, mu, shift)
                    tile_max = tl.max(zs, 0)
                    tl.store(fields + STEERED_MAX * WIDTH + tile, tile_max)
                    tl.store(
                        fields + STEERED_TOTAL * WIDTH + tile, tl.sum(exponential(zs - finite_or_zero(tile_max)), 0)
                    )
                tile = next_tile(own, tile + 1, WIDTH)


KERNEL_VARIANTS = [
    Variant(
        kept_sums_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (NUMBER.value,), "SUMS": (True,), "STEER": (True,)}
        | {"WITH_KL": (True,), "FINISH": (False,)}
        | COMPILED_ROW,
        tensors=3,
    ),
    Variant(
        kept_sums_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True,), "MU": (NUMBER.value,), "SUMS": (True,), "STEER": (True,)}
        | {"WITH_KL": (True, False), "FINISH": (True,)}
        | COMPILED_ROW,
        tensors=3,
    ),
    Variant(
        kept_sums_kernel,
        {"KL_DIRECTION": (False,), "DROP": (True,), "MU": (OWN.value,), "SUMS": (False,), "STEER": (True,)}
        | {"WITH_KL": (False,), "FINISH": (False,)}
        | COMPILED_ROW,
        tensors=3,
    ),
]
