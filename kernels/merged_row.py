"""A row's numbers, merged from its tiles: once per row, by the first program of its second launch.

The programs of that launch merge too, where they have work; they get the same bits, since the code and the layout are the
same. Later launches read the record.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode.kernels.row_algebra import (
    INF,
    NEG_INF,
    finite_or_zero,
    is_valid,
    scale_to,
    top_delta,
)
from svdecode.kernels.row_statistics import PRE_MAX, PRE_TOP, PRE_TOTAL, TOTAL, WEIGHTED, load_field

# The record of a row: max z, total (NaN for a row that is not valid), pre_top, centre; delta of the top token, 0 where either
# model excludes it; the mass of the tiles without a kept token; the number of those with one.
ROW_MAX, ROW_TOTAL, ROW_PRE_TOP, ROW_CENTRE, ROW_TOP_DELTA, ROW_REST, ROW_TILES = (tl.constexpr(i) for i in range(7))


@triton.jit
def _sum_and_two_maxima(x1, y1, z1, x2, y2, z2):
    return x1 + x2, tl.maximum(y1, y2), tl.maximum(z1, z2)


@triton.jit
def _sum(x1, x2):
    return x1 + x2


@triton.jit
def _two_sums(x1, y1, x2, y2):
    return x1 + x2, y1 + y2


@triton.jit
def merge_row(fields, used, maxima, WITH_KL: tl.constexpr, WIDTH: tl.constexpr):
    """(row, total, kl, top_excluded, valid) from the tiles in their order; `valid` is false for NaN, +inf, all -inf.

    KL = dbar - lse(z) + lse(a), of a valid row, never negative, +inf where the pre-trained model lost a token.
    """
    totals = load_field(fields, TOTAL, used, 0.0, WIDTH)
    raw_pre_tops = load_field(fields, PRE_TOP, used, NEG_INF, WIDTH)
    weighted = load_field(fields, WEIGHTED, used, 0.0, WIDTH)
    pre_maxima = load_field(fields, PRE_MAX, used, NEG_INF, WIDTH)
    maximum = tl.max(maxima, 0)
    scale = scale_to(maxima, maximum)
    tops = tl.where(maxima == maximum, raw_pre_tops, NEG_INF)
    # Reductions at once take as many barriers as one.
    total, raw_pre_top, pre_max = tl.reduce((totals * scale, tops, pre_maxima), 0, _sum_and_two_maxima)
    top_excluded = raw_pre_top == NEG_INF
    pre_top = tl.where(top_excluded, finite_or_zero(maximum), raw_pre_top)
    pre_tops = tl.where(raw_pre_tops == NEG_INF, finite_or_zero(maxima), raw_pre_tops)
    offset = finite_or_zero(maxima - finite_or_zero(maximum)) - (pre_tops - pre_top)
    differences = (weighted + totals * offset) * scale
    kl = 0.0
    if WITH_KL:
        pre_totals = load_field(fields, PRE_TOTAL, used, 0.0, WIDTH)
        pre_scaled = pre_totals * scale_to(pre_maxima, pre_max)
        difference, pre_total = tl.reduce((differences, pre_scaled), 0, _two_sums)
        centre = difference / total
        kl = tl.maximum(centre + (pre_max - pre_top) + tl.log(tl.div_rn(pre_total, total)), 0.0)
        kl = tl.where(pre_total < INF, kl, INF)  # not so where a tile's is +inf, whatever it is scaled by
    else:
        centre = tl.reduce(differences, 0, _sum) / total  # tl.sum adds in another order in Triton's interpreter
    row = (maximum, 1.0 / total, pre_top, centre)
    return row, total, kl, top_excluded, is_valid(total, centre, pre_max)


@triton.jit
def store_row(
    record, fields, used, kept, maxima, row, total, top_excluded, valid, KL_DIRECTION: tl.constexpr, WIDTH: tl.constexpr
):
    """Write the record of a row."""
    maximum, inverse, pre_top, centre = row
    totals = load_field(fields, TOTAL, used, 0.0, WIDTH)
    tl.store(record + ROW_MAX, maximum)
    tl.store(record + ROW_TOTAL, tl.where(valid, total, float("nan")))
    tl.store(record + ROW_PRE_TOP, pre_top)
    tl.store(record + ROW_CENTRE, centre)
    tl.store(record + ROW_TOP_DELTA, tl.where(top_excluded, 0.0, top_delta(row, KL_DIRECTION)))
    tl.store(record + ROW_REST, tl.sum(tl.where(kept, 0.0, totals * scale_to(maxima, maximum)), 0) * inverse)
    tl.store(record + ROW_TILES, tl.sum(kept.to(tl.float32), 0))


@triton.jit
def load_row(record):
    """(row, total) from the record; both are NaN for a row that is not valid."""
    total = tl.load(record + ROW_TOTAL)
    row = (tl.load(record + ROW_MAX), 1.0 / total, tl.load(record + ROW_PRE_TOP), tl.load(record + ROW_CENTRE))
    return row, total
