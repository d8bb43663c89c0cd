"""First pass of every operator: the statistics of each tile of each row, reading both inputs once.

One program a split (`settings.py`): it loads 4096 tokens of each input at once, so every statistic is taken from registers
with the tile's own maximum, and nothing is rescaled while streaming.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import torch
from svdecode.kernels.row_algebra import (
    LOST,
    MAX,
    NEG_INF,
    PRE_MAX,
    PRE_TOP,
    PRE_TOTAL,
    TILE_FIELDS,
    TOTAL,
    WEIGHTED,
    difference_from_top,
    finite_or_zero,
    is_valid,
    merge_differences,
    merge_totals,
    top_pre,
)
from svdecode.kernels.row_layout import RowLayout, row_start
from svdecode.kernels.settings import NUM_WARPS, TILE, TILES, splits


class RowStatistics(NamedTuple):
    """Per call, float32: tiles (R, TILE_FIELDS, splits * TILES) and the maximum of each split (R, splits)."""

    tiles: Tensor
    split_max: Tensor


@triton.jit
def row_statistics_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    split_max_ptr,
    vocabulary,
    num_splits,
    size1,
    size2,
    pre_stride0,
    pre_stride1,
    pre_stride2,
    ft_stride0,
    ft_stride1,
    ft_stride2,
    WITH_KL: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // num_splits
    split = program % num_splits
    tile = split * TILES + tl.arange(0, TILES)
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = token < vocabulary
    pre_row = pre_ptr + row_start(row, size1, size2, pre_stride0, pre_stride1, pre_stride2)
    ft_row = ft_ptr + row_start(row, size1, size2, ft_stride0, ft_stride1, ft_stride2)
    z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
    a = tl.load(pre_row + token, mask=inside, other=NEG_INF).to(tl.float32)

    maximum = tl.max(z, 1)
    e = tl.exp(z - finite_or_zero(maximum)[:, None])  # e^-inf = 0 outside the vocabulary
    total = tl.sum(e, 1)
    top = finite_or_zero(maximum)
    pre_top = top_pre(z, a, maximum[:, None], 1)
    weighted = tl.sum(e * difference_from_top(z, a, top[:, None], pre_top[:, None]), 1)
    pre_max = tl.max(a, 1)
    fields = tiles_ptr + row.to(tl.int64) * (TILE_FIELDS * num_splits * TILES) + tile
    width = num_splits * TILES
    tl.store(fields + MAX * width, maximum)
    tl.store(fields + TOTAL * width, total)
    tl.store(fields + PRE_TOP * width, pre_top)
    tl.store(fields + WEIGHTED * width, weighted)
    tl.store(fields + PRE_MAX * width, pre_max)
    if WITH_KL:
        tl.store(fields + PRE_TOTAL * width, tl.sum(tl.exp(a - finite_or_zero(pre_max)[:, None]), 1))
        lost = (a == NEG_INF) & (z > NEG_INF)
        tl.store(fields + LOST * width, tl.max(lost.to(tl.float32), 1))
    tl.store(split_max_ptr + row.to(tl.int64) * num_splits + split, tl.max(maximum, 0))


@triton.jit
def load_field(fields, FIELD: tl.constexpr, width, other, WIDTH: tl.constexpr):
    """One statistic of all tiles (or splits) of a row as a vector of WIDTH >= width."""
    index = tl.arange(0, WIDTH)
    return tl.load(fields + FIELD * width + index, mask=index < width, other=other)


@triton.jit
def merge_row(fields, width, WIDTH: tl.constexpr):
    """(total, pre_top, centre, valid) of a row from its tiles in their order; `valid` is false for NaN, +inf, all -inf."""
    maxima = load_field(fields, MAX, width, NEG_INF, WIDTH)
    totals = load_field(fields, TOTAL, width, 0.0, WIDTH)
    pre_tops = load_field(fields, PRE_TOP, width, 0.0, WIDTH)
    weighted = load_field(fields, WEIGHTED, width, 0.0, WIDTH)
    maximum, total = merge_totals(maxima, totals)
    pre_top, centre = merge_differences(maxima, totals, pre_tops, weighted, maximum, total)
    pre_max = tl.max(load_field(fields, PRE_MAX, width, NEG_INF, WIDTH), 0)
    return total, pre_top, centre, is_valid(total, centre, pre_max)


@triton.jit
def row_kl(fields, width, total, pre_top, centre, WIDTH: tl.constexpr):
    """KL = dbar - lse(z) + lse(a) of a valid row, never negative, +inf where the pre-trained model lost a token."""
    pre_max, pre_total = merge_totals(
        load_field(fields, PRE_MAX, width, NEG_INF, WIDTH), load_field(fields, PRE_TOTAL, width, 0.0, WIDTH)
    )
    kl = tl.maximum(centre + (pre_max - pre_top) + tl.log(pre_total) - tl.log(total), 0.0)
    lost = tl.max(load_field(fields, LOST, width, 0.0, WIDTH), 0)
    return tl.where(lost > 0, float("inf"), kl)


def row_statistics(pre: Tensor, ft: Tensor, layout: RowLayout, with_kl: bool) -> RowStatistics:
    """Launch the first pass over R rows; the buffers belong to the caller."""
    vocabulary = ft.shape[-1]
    rows, num_splits = ft.numel() // vocabulary, splits(vocabulary)
    tiles = torch.empty((rows, TILE_FIELDS.value, num_splits * TILES), dtype=torch.float32, device=ft.device)
    split_max = torch.empty((rows, num_splits), dtype=torch.float32, device=ft.device)
    row_statistics_kernel[(rows * num_splits,)](
        *(pre, ft, tiles, split_max, vocabulary, num_splits),
        *layout.pair_arguments,
        WITH_KL=with_kl,
        TILES=TILES,
        TILE=TILE,
        num_warps=NUM_WARPS,
    )
    return RowStatistics(tiles, split_max)


# What `bench/compile_report.py` compiles: each kernel with the values of its constexpr parameters.
KERNEL_VARIANTS = [(row_statistics_kernel, {"WITH_KL": (False, True), "TILES": (TILES,), "TILE": (TILE,)})]
