"""steered_nll: the NLL of the labels under M strengths at once, two launches, nothing of size (..., V).

1. `row_statistics_kernel`   reads both inputs once
2. `steered_nll_kernel`      one program for a row and STRENGTHS strengths: it walks the tiles that hold kept tokens and keeps a
                             running normaliser for each strength; all other tokens enter through their totals
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.constants import KL
from svdecode.kernels.arguments import log_threshold
from svdecode.kernels.fused_steer import (
    SAVED_CENTRE,
    SAVED_FIELDS,
    SAVED_MAXIMUM,
    SAVED_MEAN,
    SAVED_NORMALISER,
    SAVED_PRE_TOP,
    SAVED_TOTAL,
)
from svdecode.kernels.kept_sums import IGNORE
from svdecode.kernels.launch import launch
from svdecode.kernels.row_algebra import (
    MAX,
    NEG_INF,
    SPLIT_FIELDS,
    TILE_FIELDS,
    TILE_TOTAL,
    finite_or_zero,
    scale_to,
    shift_outside,
    steered,
    steering,
)
from svdecode.kernels.row_layout import RowLayout, on_device_of, row_start
from svdecode.kernels.row_statistics import (
    load_field,
    load_label,
    load_tile,
    merge_row,
    next_tile,
    row_statistics,
    tiles_with_kept,
)
from svdecode.kernels.settings import LAUNCH, STRENGTHS, TILE, TILES, next_power_of_2, splits


@triton.jit
def outside_tiles_mass(tiles, fields, kept_tiles, maximum, num_splits, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of e^(z - max) over the tiles without a kept token; a tile's total is relative to its split's maximum."""
    index = tl.arange(0, WIDTH)
    inside = index < num_splits * TILES
    split_max = tl.load(fields + MAX * num_splits + index // TILES, mask=inside, other=NEG_INF)
    totals = load_field(tiles, TILE_TOTAL, num_splits * TILES, 0.0, WIDTH)
    return tl.sum(tl.where(kept_tiles, 0.0, totals * scale_to(split_max, maximum)), 0)


@triton.jit
def steered_nll_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    splits_ptr,
    label_ptr,
    mu_ptr,
    nll_out_ptr,
    saved_out_ptr,
    log_alpha,
    penalty,
    vocabulary,
    num_splits,
    num_strengths,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    STRENGTHS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store the NLL of one row at STRENGTHS strengths; the first of a row's programs stores what the backward needs."""
    row_index = tl.program_id(0)
    block = tl.program_id(1)
    row64 = row_index.to(tl.int64)
    strength = block * STRENGTHS + tl.arange(0, STRENGTHS)
    exists = strength < num_strengths
    mu = tl.load(mu_ptr + strength, mask=exists, other=0.0)
    shift = shift_outside(mu, penalty, DROP)

    fields = splits_ptr + row64 * (SPLIT_FIELDS * num_splits)
    tiles = tiles_ptr + row64 * (TILE_FIELDS * num_splits * TILES)
    sizes, pre_strides, ft_strides = layout
    pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
    ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)
    maximum = tl.max(load_field(fields, MAX, num_splits, NEG_INF, SPLITS), 0)
    threshold = maximum + log_alpha
    total, pre_top, centre, valid = merge_row(fields, num_splits, SPLITS)
    row = (maximum, total, pre_top, centre)
    kept_tiles = tiles_with_kept(tiles, num_splits * TILES, threshold, SPLITS * TILES)

    top = tl.full([STRENGTHS], float("-inf"), tl.float32)
    mass = tl.zeros([STRENGTHS], tl.float32)
    if not DROP:
        outside = outside_tiles_mass(tiles, fields, kept_tiles, maximum, num_splits, TILES, SPLITS * TILES)
        top = tl.where(outside > 0, shift, top)
        mass = mass + outside
    tile = next_tile(kept_tiles, 0, SPLITS * TILES)
    while tile < SPLITS * TILES:
        _token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, TILE)
        keep = (z >= threshold) & inside
        u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
        zs = steered(u[None, :], delta[None, :], keep[None, :], mu[:, None], shift[:, None])
        tile_max = tl.maximum(top, tl.max(zs, 1))
        tile_total = tl.sum(tl.exp(zs - finite_or_zero(tile_max)[:, None]), 1)
        mass = mass * scale_to(top, tile_max) + tile_total
        top = tile_max
        tile = next_tile(kept_tiles, tile + 1, SPLITS * TILES)

    label = tl.load(label_ptr + row_index)
    in_range, z, a = load_label(pre_row, ft_row, label, vocabulary)
    u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
    nll = top + tl.log(mass) - steered(u, delta, z >= threshold, mu, shift)
    nll = tl.where(in_range, nll, tl.where(label == IGNORE, 0.0, float("nan")))
    nll = tl.where(valid, nll, float("nan"))
    tl.store(nll_out_ptr + row64 * num_strengths + strength, nll, mask=exists)
    if block == 0:
        saved = saved_out_ptr + row64 * SAVED_FIELDS
        tl.store(saved + SAVED_MAXIMUM, maximum)
        tl.store(saved + SAVED_TOTAL, tl.where(valid, total, float("nan")))
        tl.store(saved + SAVED_PRE_TOP, pre_top)
        tl.store(saved + SAVED_CENTRE, centre)
        tl.store(saved + SAVED_NORMALISER, 0.0)  # each strength has its own: it comes again from the NLL
        tl.store(saved + SAVED_MEAN, 0.0)


def steered_nll(
    logits_pre: Tensor,
    logits_ft: Tensor,
    labels: Tensor,
    mu: Tensor,
    alpha: float,
    penalty: float,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """(nll (..., M), saved for the backward); arguments are checked by `svdecode.ops`."""
    vocabulary = logits_ft.shape[-1]
    layout = RowLayout(logits_pre, logits_ft)
    pre, ft = layout.tensors
    nll = torch.empty((*labels.shape, mu.shape[0]), dtype=torch.float32, device=ft.device)
    saved = torch.empty((*labels.shape, SAVED_FIELDS.value), dtype=torch.float32, device=ft.device)
    num_splits = splits(vocabulary)
    if labels.numel() == 0 or mu.numel() == 0:
        return nll, saved.zero_()
    with on_device_of(ft):
        statistics = row_statistics(pre, ft, layout, with_kl=False)
        inputs = (pre, ft, *statistics, labels.reshape(-1).contiguous(), mu.float().contiguous(), nll, saved)
        numbers = (log_threshold(alpha), penalty, vocabulary, num_splits, mu.shape[0], layout.of(pre, ft))
        launch(
            steered_nll_kernel,
            (labels.numel(), triton.cdiv(mu.shape[0], STRENGTHS)),
            (*inputs, *numbers),
            dict(
                KL_DIRECTION=direction == KL,
                DROP=penalty == -math.inf,
                STRENGTHS=STRENGTHS,
                TILES=TILES,
                TILE=TILE,
                SPLITS=next_power_of_2(num_splits),
                **LAUNCH,
            ),
        )
    return nll, saved


KERNEL_VARIANTS = [
    (
        steered_nll_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "STRENGTHS": (STRENGTHS,), "TILES": (TILES,), "TILE": (TILE,)}
        | {"SPLITS": (32,)},
        2,
    )
]
