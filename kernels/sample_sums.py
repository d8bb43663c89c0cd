"""What `steer_sample` and `steer_topk` need of each split: its best token, its part of the steered normaliser, its mass.

The mass is that at the temperature. It is computed only where a token is drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.constants import KL
from svdecode.kernels.arguments import log_threshold, strength_source
from svdecode.kernels.kept_sums import PER_ROW
from svdecode.kernels.launch import launch
from svdecode.kernels.row_algebra import (
    MAX,
    NEG_INF,
    SPLIT_FIELDS,
    TILE_FIELDS,
    TILE_MAX,
    add_totals,
    finite_or_zero,
    shift_outside,
    steered,
    steering,
)
from svdecode.kernels.row_layout import RowLayout, row_start
from svdecode.kernels.row_statistics import load_field, load_tile, merge_row, row_statistics
from svdecode.kernels.settings import COMPILED_ROW, LAUNCH, TILE, TILES, next_power_of_2, splits

BEST_MAX, BEST_TOTAL, BEST_TOKEN, MASS = (tl.constexpr(i) for i in range(4))
SAMPLE_FIELDS = tl.constexpr(4)
NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def steered_tile(
    pre_row, ft_row, tile, vocabulary, row, threshold, mu, shift, KL_DIRECTION: tl.constexpr, TILE: tl.constexpr
):
    """(token, zs relative to the row's maximum) of a tile, -inf outside the vocabulary."""
    token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, TILE)
    u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
    zs = steered(u, delta, (z >= threshold) & inside, mu, shift)
    return token, tl.where(inside, zs, NEG_INF)


@triton.jit
def sample_sums_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    splits_ptr,
    sums_ptr,
    mu_ptr,
    mu_number,
    log_alpha,
    penalty,
    inverse_temperature,
    vocabulary,
    num_splits,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    GREEDY: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store the best token, the steered total and the mass at the temperature of one split, if it holds a kept token."""
    program = tl.program_id(0)
    row_index = program // num_splits
    split = program % num_splits
    row64 = row_index.to(tl.int64)
    fields = splits_ptr + row64 * (SPLIT_FIELDS * num_splits)
    maximum = tl.max(load_field(fields, MAX, num_splits, NEG_INF, SPLITS), 0)
    threshold = maximum + log_alpha
    if (not DROP) or (tl.load(fields + MAX * num_splits + split) >= threshold):
        total, pre_top, centre, _valid = merge_row(fields, num_splits, SPLITS)
        row = (maximum, total, pre_top, centre)
        tiles = tiles_ptr + row64 * (TILE_FIELDS * num_splits * TILES)
        sizes, pre_strides, ft_strides = layout
        pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
        ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)
        mu = mu_number
        if MU == PER_ROW:
            mu = tl.load(mu_ptr + row_index)
        shift = shift_outside(mu, penalty, DROP)
        best = float("-inf")
        best_total = 0.0
        best_token = NO_TOKEN
        mass = 0.0
        for i in range(TILES):
            tile = split * TILES + i
            if (not DROP) or (tl.load(tiles + TILE_MAX * num_splits * TILES + tile) >= threshold):
                token, zs = steered_tile(
                    pre_row, ft_row, tile, vocabulary, row, threshold, mu, shift, KL_DIRECTION, TILE
                )
                tile_max = tl.max(zs, 0)
                first = tl.min(tl.where(zs == tile_max, token, NO_TOKEN), 0)
                best_token = tl.where(tile_max > best, first, best_token)  # a tie keeps the lower token
                if not GREEDY:
                    common = tl.maximum(best, tile_max)
                    scaled = tl.exp((zs - finite_or_zero(common)) * inverse_temperature)
                    old = tl.where(best == NEG_INF, 0.0, tl.exp((best - finite_or_zero(common)) * inverse_temperature))
                    mass = mass * old + tl.sum(scaled, 0)
                tile_total = tl.sum(tl.exp(zs - finite_or_zero(tile_max)), 0)
                best, best_total = add_totals(best, best_total, tile_max, tile_total)
        own = sums_ptr + row64 * (SAMPLE_FIELDS * num_splits) + split
        tl.store(own + BEST_MAX * num_splits, best)
        tl.store(own + BEST_TOTAL * num_splits, best_total)
        tl.store(own + BEST_TOKEN * num_splits, best_token.to(tl.float32, bitcast=True))
        tl.store(own + MASS * num_splits, mass)


class SampledSplits(NamedTuple):
    """Arguments that the last launch shares with the ones before it, in their order."""

    inputs: tuple
    numbers: tuple
    sizes: tuple
    constants: dict[str, object]


def sample_sums(
    layout: RowLayout, mu: float | Tensor, temperature: float, alpha: float, penalty: float, direction: str
) -> SampledSplits:
    """Launch the first two passes over all rows (at least one); a temperature of 0 needs no mass."""
    pre, ft = layout.tensors
    vocabulary = ft.shape[-1]
    rows, num_splits = ft.numel() // vocabulary, splits(vocabulary)
    source, number, per_row = strength_source(mu, ft)
    statistics = row_statistics(pre, ft, layout, with_kl=False)
    sums = torch.empty((rows, SAMPLE_FIELDS.value, num_splits), dtype=torch.float32, device=ft.device)
    inputs = (pre, ft, *statistics, sums, per_row)
    numbers = (number, log_threshold(alpha), penalty)
    sizes = (vocabulary, num_splits, layout.of(pre, ft))
    constants = dict(
        KL_DIRECTION=direction == KL,
        DROP=penalty == -math.inf,
        MU=source,
        TILES=TILES,
        TILE=TILE,
        SPLITS=next_power_of_2(num_splits),
        **LAUNCH,
    )
    greedy = temperature == 0
    inverse_temperature = 1.0 if greedy else 1.0 / temperature
    launch(
        sample_sums_kernel,
        (rows * num_splits,),
        (*inputs, *numbers, inverse_temperature, *sizes),
        dict(GREEDY=greedy, **constants),
    )
    return SampledSplits(inputs, (*numbers, inverse_temperature), sizes, constants)


KERNEL_VARIANTS = [
    (
        sample_sums_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (0,), "GREEDY": (True, False)} | COMPILED_ROW,
        2,
    ),
]
