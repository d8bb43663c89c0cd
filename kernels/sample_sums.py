"""What `steer_sample` and `steer_topk` need of each tile: its best token, its part of the steered normaliser, its mass.

The mass is that at the temperature. It is computed only where a token is drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from svdecode.constants import KL
from svdecode.kernels.arguments import log_threshold, strength_source
from svdecode.kernels.kept_sums import NUMBER, PER_ROW
from svdecode.kernels.launch import launch
from svdecode.kernels.merged_row import merge_row, store_row
from svdecode.kernels.row_algebra import NEG_INF, exponential, finite_or_zero, shift_outside, steered, steering
from svdecode.kernels.row_layout import RowLayout, row_pointer
from svdecode.kernels.row_statistics import (
    OWN_FIELDS,
    load_tile,
    next_tile,
    of_group,
    open_row,
    row_statistics,
    workspace_of,
)
from svdecode.kernels.settings import UNSPECIALISED, groups
from svdecode.kernels.variants import COMPILED_ROW, Variant

BEST_MAX, BEST_TOTAL, BEST_TOKEN, MASS = (tl.constexpr(OWN_FIELDS + i) for i in range(4))
NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def steered_tile(tile, opened, KL_DIRECTION: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr):
    """(token, zs relative to the row's maximum) of a tile, -inf outside the vocabulary.

    `opened` is what the tiles of a row share: (pre_row, ft_row, vocabulary, row, threshold, mu, shift).
    """
    pre_row, ft_row, vocabulary, row, threshold, mu, shift = opened
    token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, ALIGN, TILE)
    u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
    zs = steered(u, delta, (z >= threshold) & inside, mu, shift)
    return token, tl.where(inside, zs, NEG_INF)


@triton.jit(do_not_specialize=UNSPECIALISED)
def sample_sums_kernel(
    pre_ptr,
    ft_ptr,
    workspace_ptr,
    mu_ptr,
    mu_number,
    log_alpha,
    penalty,
    inverse_temperature,
    vocabulary,
    num_tiles,
    group_size,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    GREEDY: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the best token, the steered total and the mass at the temperature of a group's tiles.

    With DROP only tiles with kept tokens are read. The first program of a row also merges it for the launch after.
    """
    row_index = tl.program_id(0)
    group = tl.program_id(1)
    record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    used, maxima, kept, threshold = open_row(fields, num_tiles, log_alpha, WIDTH)
    wanted = of_group(kept if DROP else used, group, group_size, WIDTH)
    tile = next_tile(wanted, 0, WIDTH)
    if (tile < WIDTH) | (group == 0):
        row, total, top_excluded, valid = merge_row(fields, used, maxima, WIDTH)
        if group == 0:
            store_row(record, fields, used, kept, maxima, row, total, top_excluded, valid, KL_DIRECTION, WIDTH)
        sizes, pre_strides, ft_strides = layout
        pre_row = row_pointer(pre_ptr, row_index, sizes, pre_strides, zero, ALIGN)
        ft_row = row_pointer(ft_ptr, row_index, sizes, ft_strides, zero, ALIGN)
        mu = mu_number
        if MU == PER_ROW:
            mu = tl.load(mu_ptr + row_index)
        opened = (pre_row, ft_row, vocabulary, row, threshold, mu, shift_outside(mu, penalty, DROP))
        while tile < WIDTH:
            token, zs = steered_tile(tile, opened, KL_DIRECTION, ALIGN, TILE)
            best = tl.max(zs, 0)
            first = tl.min(tl.where(zs == best, token, NO_TOKEN), 0)
            below = zs - finite_or_zero(best)
            tl.store(fields + BEST_MAX * WIDTH + tile, best)
            tl.store(fields + BEST_TOKEN * WIDTH + tile, first.to(tl.float32, bitcast=True))
            tl.store(fields + BEST_TOTAL * WIDTH + tile, tl.sum(exponential(below), 0))
            if not GREEDY:
                tl.store(fields + MASS * WIDTH + tile, tl.sum(exponential(below * inverse_temperature), 0))
            tile = next_tile(wanted, tile + 1, WIDTH)


class Sampled(NamedTuple):
    """What the last launch shares with the ones before it."""

    inputs: tuple
    """logits_pre, logits_ft, the workspace, mu per row."""
    numbers: tuple
    """mu, log alpha, penalty, 1 / temperature."""
    sizes: tuple
    """vocabulary, tiles."""
    constants: dict[str, object]


def sample_sums(
    layout: RowLayout, mu: float | Tensor, temperature: float, alpha: float, penalty: float, direction: str
) -> Sampled:
    """Launch the first two passes over all rows (at least one); a temperature of 0 needs no mass."""
    pre, ft = layout.tensors
    source, number, per_row = strength_source(mu, ft)
    space = row_statistics(layout, with_kl=False)
    greedy = temperature == 0
    inputs = (pre, ft, space.memory, per_row)
    numbers = (number, log_threshold(alpha), penalty, 1.0 if greedy else 1.0 / temperature)
    sizes = (space.vocabulary, space.num_tiles)
    constants = {"KL_DIRECTION": direction == KL, "DROP": penalty == -math.inf, "MU": source, **space.constants}
    count, size = groups(space.rows, space.num_tiles)
    launch(
        sample_sums_kernel,
        (space.rows, count, 1),
        (*inputs, *numbers, *sizes, size, 0, layout.of(pre, ft)),
        {"GREEDY": greedy, **constants},
    )
    return Sampled(inputs, numbers, sizes, constants)


KERNEL_VARIANTS = [
    Variant(
        sample_sums_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (NUMBER.value,), "GREEDY": (True, False)} | COMPILED_ROW,
        tensors=2,
    )
]
