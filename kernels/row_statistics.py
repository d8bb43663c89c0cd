"""First pass of every operator: the statistics of each split of each row, reading both inputs once.

One program per split (`settings.py`): it loads 4096 tokens of each input at once, so every statistic is taken from registers
with the split's own maximum, and nothing is rescaled while streaming. Each tile inside a split keeps only its maximum and its
total: later passes skip the tiles that hold no kept token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.kernels.launch import launch
from svdecode.kernels.row_algebra import (
    LOST,
    MAX,
    NEG_INF,
    PRE_MAX,
    PRE_TOP,
    PRE_TOTAL,
    SPLIT_FIELDS,
    TILE_FIELDS,
    TILE_MAX,
    TILE_TOTAL,
    TOTAL,
    WEIGHTED,
    difference_from_top,
    finite_or_zero,
    is_valid,
    merge_differences,
    merge_totals,
)
from svdecode.kernels.row_layout import RowLayout, row_start
from svdecode.kernels.settings import LAUNCH, TILE, TILES, splits


class RowStatistics(NamedTuple):
    """Per call, float32: tiles (R, TILE_FIELDS, splits * TILES) and splits (R, SPLIT_FIELDS, splits)."""

    tiles: Tensor
    splits: Tensor


@triton.jit
def row_statistics_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    splits_ptr,
    vocabulary,
    num_splits,
    layout,
    WITH_KL: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the statistics of one split and of its tiles."""
    program = tl.program_id(0)
    row = program // num_splits
    split = program % num_splits
    row64 = row.to(tl.int64)
    tile = split * TILES + tl.arange(0, TILES)
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = token < vocabulary
    sizes, pre_strides, ft_strides = layout
    pre_row = pre_ptr + row_start(row, sizes, pre_strides)
    ft_row = ft_ptr + row_start(row, sizes, ft_strides)
    z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
    a = tl.load(pre_row + token, mask=inside, other=NEG_INF).to(tl.float32)

    tile_max = tl.max(z, 1)
    maximum = tl.max(tile_max, 0)
    top = finite_or_zero(maximum)
    e = tl.exp(z - top)  # e^-inf = 0 outside the vocabulary
    tile_total = tl.sum(e, 1)
    # The largest a of the tokens at the maximum; where that is -inf, any finite number serves.
    pre_top = finite_or_zero(tl.max(tl.max(tl.where(z == maximum, a, NEG_INF), 1), 0))
    weighted = tl.sum(tl.sum(e * difference_from_top(z, a, top, pre_top), 1), 0)
    pre_max = tl.max(tl.max(a, 1), 0)

    tiles = tiles_ptr + row64 * (TILE_FIELDS * num_splits * TILES) + tile
    tl.store(tiles + TILE_MAX * num_splits * TILES, tile_max)
    tl.store(tiles + TILE_TOTAL * num_splits * TILES, tile_total)
    fields = splits_ptr + row64 * (SPLIT_FIELDS * num_splits) + split
    tl.store(fields + MAX * num_splits, maximum)
    tl.store(fields + TOTAL * num_splits, tl.sum(tile_total, 0))
    tl.store(fields + PRE_TOP * num_splits, pre_top)
    tl.store(fields + WEIGHTED * num_splits, weighted)
    tl.store(fields + PRE_MAX * num_splits, pre_max)
    if WITH_KL:
        lost = ((a == NEG_INF) & (z > NEG_INF)).to(tl.float32)
        tl.store(fields + PRE_TOTAL * num_splits, tl.sum(tl.sum(tl.exp(a - finite_or_zero(pre_max)), 1), 0))
        tl.store(fields + LOST * num_splits, tl.max(tl.max(lost, 1), 0))


@triton.jit
def load_field(fields, FIELD: tl.constexpr, width, other, WIDTH: tl.constexpr):
    """One field of all splits (or tiles) of a row as a vector of WIDTH >= width."""
    index = tl.arange(0, WIDTH)
    return tl.load(fields + FIELD * width + index, mask=index < width, other=other)


@triton.jit
def merge_row(fields, num_splits, SPLITS: tl.constexpr):
    """(total, pre_top, centre, valid) of a row from its splits in their order; `valid` is false for NaN, +inf, all -inf."""
    maxima = load_field(fields, MAX, num_splits, NEG_INF, SPLITS)
    totals = load_field(fields, TOTAL, num_splits, 0.0, SPLITS)
    pre_tops = load_field(fields, PRE_TOP, num_splits, 0.0, SPLITS)
    weighted = load_field(fields, WEIGHTED, num_splits, 0.0, SPLITS)
    maximum, total = merge_totals(maxima, totals)
    pre_top, centre = merge_differences(maxima, totals, pre_tops, weighted, maximum, total)
    pre_max = tl.max(load_field(fields, PRE_MAX, num_splits, NEG_INF, SPLITS), 0)
    return total, pre_top, centre, is_valid(total, centre, pre_max)


@triton.jit
def row_kl(fields, num_splits, total, pre_top, centre, SPLITS: tl.constexpr):
    """KL = dbar - lse(z) + lse(a) of a valid row, never negative, +inf where the pre-trained model lost a token."""
    pre_max, pre_total = merge_totals(
        load_field(fields, PRE_MAX, num_splits, NEG_INF, SPLITS), load_field(fields, PRE_TOTAL, num_splits, 0.0, SPLITS)
    )
    kl = tl.maximum(centre + (pre_max - pre_top) + tl.log(pre_total) - tl.log(total), 0.0)
    lost = tl.max(load_field(fields, LOST, num_splits, 0.0, SPLITS), 0)
    return tl.where(lost > 0, float("inf"), kl)


@triton.jit
def tiles_with_kept(tiles, num_tiles, threshold, WIDTH: tl.constexpr):
    """Which tiles of a row hold a kept token, as a vector of WIDTH >= num_tiles."""
    index = tl.arange(0, WIDTH)
    return (load_field(tiles, TILE_MAX, num_tiles, NEG_INF, WIDTH) >= threshold) & (index < num_tiles)


@triton.jit
def next_tile(wanted, start, WIDTH: tl.constexpr):
    """The first wanted tile from `start` on, WIDTH where there is none."""
    index = tl.arange(0, WIDTH)
    return tl.min(tl.where(wanted & (index >= start), index, WIDTH), 0)


@triton.jit
def load_tile(pre_row, ft_row, tile, vocabulary, TILE: tl.constexpr):
    """(token, inside, z, a) of a tile in float32; -inf outside the vocabulary."""
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < vocabulary
    z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
    a = tl.load(pre_row + token, mask=inside, other=NEG_INF).to(tl.float32)
    return token, inside, z, a


@triton.jit
def load_label(pre_row, ft_row, label, vocabulary):
    """(in_range, z, a) of a label in float32; -inf, and no access, where it is outside the vocabulary."""
    in_range = (label >= 0) & (label < vocabulary)
    z = tl.load(ft_row + label, mask=in_range, other=NEG_INF).to(tl.float32)
    a = tl.load(pre_row + label, mask=in_range, other=NEG_INF).to(tl.float32)
    return in_range, z, a


def row_statistics(pre: Tensor, ft: Tensor, layout: RowLayout, with_kl: bool) -> RowStatistics:
    """Launch the first pass over R rows; the buffers belong to the caller."""
    vocabulary = ft.shape[-1]
    rows, num_splits = ft.numel() // vocabulary, splits(vocabulary)
    tiles = torch.empty((rows, TILE_FIELDS.value, num_splits * TILES), dtype=torch.float32, device=ft.device)
    fields = torch.empty((rows, SPLIT_FIELDS.value, num_splits), dtype=torch.float32, device=ft.device)
    launch(
        row_statistics_kernel,
        (rows * num_splits,),
        (pre, ft, tiles, fields, vocabulary, num_splits, layout.of(pre, ft)),
        dict(WITH_KL=with_kl, TILES=TILES, TILE=TILE, **LAUNCH),
    )
    return RowStatistics(tiles, fields)


# What `bench/compile_report.py` compiles: each kernel with the values of its constexpr parameters.
# The last entry is the number of tensors whose strides `layout` carries.
KERNEL_VARIANTS = [(row_statistics_kernel, {"WITH_KL": (False, True), "TILES": (TILES,), "TILE": (TILE,)}, 2)]
