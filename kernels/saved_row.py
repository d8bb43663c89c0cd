"""What the backward needs of a row beside its logits: SAVED_FIELDS float32 per row, one place that writes and reads them."""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode import constants

SAVED_MAX, SAVED_TOTAL, SAVED_PRE_TOP, SAVED_CENTRE, SAVED_NORMALISER, SAVED_MEAN = (tl.constexpr(i) for i in range(6))
SAVED_FIELDS = tl.constexpr(constants.SAVED_FIELDS)


@triton.jit
def save_row(saved_ptr, row_index, row, total, normaliser, mean):
    """Store a row, its total (NaN where the row is not valid), the normaliser of zs and sum_K p delta."""
    maximum, _inverse, pre_top, centre = row
    saved = saved_ptr + row_index.to(tl.int64) * SAVED_FIELDS
    tl.store(saved + SAVED_MAX, maximum)
    tl.store(saved + SAVED_TOTAL, total)
    tl.store(saved + SAVED_PRE_TOP, pre_top)
    tl.store(saved + SAVED_CENTRE, centre)
    tl.store(saved + SAVED_NORMALISER, normaliser)
    tl.store(saved + SAVED_MEAN, mean)


@triton.jit
def saved_row(saved_ptr, row_index, log_alpha):
    """(row, total, threshold, normaliser, sum_K p delta) of a row."""
    saved = saved_ptr + row_index.to(tl.int64) * SAVED_FIELDS
    maximum = tl.load(saved + SAVED_MAX)
    total = tl.load(saved + SAVED_TOTAL)
    row = (maximum, 1.0 / total, tl.load(saved + SAVED_PRE_TOP), tl.load(saved + SAVED_CENTRE))
    return row, total, maximum + log_alpha, tl.load(saved + SAVED_NORMALISER), tl.load(saved + SAVED_MEAN)
