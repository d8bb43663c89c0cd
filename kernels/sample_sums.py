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
from svdecode.kernels.held_row import HELD_TILES, ends_of, kept_of_slots, load_held
from svdecode.kernels.kept_sums import NUMBER, row_strength
from svdecode.kernels.launch import launch
from svdecode.kernels.merged_row import load_row, merge_row, store_row
from svdecode.kernels.row_algebra import (
    NEG_INF,
    exponential,
    finite_or_zero,
    merge_totals,
    shift_outside,
    steered,
    steering,
)
from svdecode.kernels.row_layout import RowLayout, logit_rows
from svdecode.kernels.row_statistics import (
    FEW_TILES,
    OWN_FIELDS,
    ROW_ARRIVED,
    load_field,
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
MOST_LOGPROB = tl.constexpr(0.0001)
"""Rounding takes a log-probability so far above 0; one that is larger shows NaN or +inf in the row."""


@triton.jit
def steered_tokens(z, a, inside, opened, KL_DIRECTION: tl.constexpr):
    """zs relative to the row's maximum, -inf outside the vocabulary; `opened` is (row, threshold, mu, shift)."""
    row, threshold, mu, shift = opened
    u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
    return tl.where(inside, steered(u, delta, (z >= threshold) & inside, mu, shift), NEG_INF)


@triton.jit
def steered_tile(tile, opened, KL_DIRECTION: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr):
    """(token, zs relative to the row's maximum) of a tile, -inf outside the vocabulary.

    `opened` is what the tiles of a row share: (pre_row, ft_row, vocabulary, row, threshold, mu, shift).
    """
    pre_row, ft_row, vocabulary, row, threshold, mu, shift = opened
    token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, ALIGN, TILE)
    return token, steered_tokens(z, a, inside, (row, threshold, mu, shift), KL_DIRECTION)


@triton.jit
def best_of_tile(token, zs):
    """(best zs, zs relative to it, the first of the best tokens)."""
    best = tl.max(zs, 0)
    return best, zs - finite_or_zero(best), tl.min(tl.where(zs == best, token, NO_TOKEN), 0)


@triton.jit
def merge_best(fields, wanted, WIDTH: tl.constexpr):
    """(best zs of each tile, best of the row, steered total relative to it, first of the best tokens) of the wanted tiles."""
    best = load_field(fields, BEST_MAX, wanted, NEG_INF, WIDTH)
    top, steered_total = merge_totals(best, load_field(fields, BEST_TOTAL, wanted, 0.0, WIDTH))
    token = load_field(fields, BEST_TOKEN, wanted, 0.0, WIDTH).to(tl.int32, bitcast=True)
    return best, top, steered_total, tl.min(tl.where(wanted & (best == top), token, NO_TOKEN), 0)


@triton.jit
def store_greedy(token_out_ptr, logprob_out_ptr, row_index, token, steered_total, valid):
    """Store a row's best token and its log-probability, where the steered total is relative to it."""
    logprob = -tl.log(steered_total)
    sound = valid & (logprob <= MOST_LOGPROB) & (token < NO_TOKEN)
    tl.store(token_out_ptr + row_index, tl.where(sound, token, -1).to(tl.int64))
    tl.store(logprob_out_ptr + row_index, tl.where(sound, logprob, float("nan")))


@triton.jit
def is_last_of_row(record, programs):
    """Whether the others of the row's programs have come here before: what they stored is then visible."""
    tl.debug_barrier()  # what all warps of this program stored comes before its one atomic
    counter = (record + ROW_ARRIVED).to(tl.pointer_type(tl.int32))
    return tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1


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
    token_out_ptr,
    logprob_out_ptr,
    vocabulary,
    num_tiles,
    group_size,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    GREEDY: tl.constexpr,
    FINISH: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the best token, the steered total and the mass at the temperature of a group's tiles.

    With DROP only tiles with kept tokens are read. The first program of a row also merges it for the launch after. With FINISH
    there is none: the first program of a row with few kept tokens, or the last of all its programs, stores the best token.
    """
    row_index = tl.program_id(0)
    group = tl.program_id(1)
    record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    used, maxima, kept, threshold = open_row(fields, num_tiles, log_alpha, WIDTH)
    pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
    mu = row_strength(mu_ptr, row_index, mu_number, MU)
    shift = shift_outside(mu, penalty, DROP)
    finished = False
    programs = tl.num_programs(1)
    if FINISH and DROP:
        first, last, number = ends_of(kept, WIDTH)
        if number <= FEW_TILES:  # all of them are the first program's: nobody waits for the others
            programs = 1
            finished = group > 0
        if (number <= HELD_TILES) & (group == 0):
            start, z = load_held(ft_row, first, last, vocabulary, ALIGN, TILE)
            row, total, _kl, _top_excluded, valid = merge_row(fields, used, maxima, False, WIDTH)
            token, z, keep, finished = kept_of_slots(start, z, threshold)
            if finished:
                a = tl.load(pre_row + token, mask=keep, other=NEG_INF).to(tl.float32)
                zs = steered_tokens(z, a, keep, (row, threshold, mu, shift), KL_DIRECTION)
                _best, below, chosen = best_of_tile(token, zs)
                steered_total = tl.sum(exponential(below), 0)
                store_greedy(token_out_ptr, logprob_out_ptr, row_index, chosen, steered_total, valid)
    if not finished:
        wanted = of_group(kept if DROP else used, group, group_size, WIDTH)
        tile = next_tile(wanted, 0, WIDTH)
        if (tile < WIDTH) | (group == 0):
            row, total, _kl, top_excluded, valid = merge_row(fields, used, maxima, False, WIDTH)
            if group == 0:
                store_row(record, fields, used, kept, maxima, row, total, top_excluded, valid, KL_DIRECTION, WIDTH)
            opened = (pre_row, ft_row, vocabulary, row, threshold, mu, shift)
            while tile < WIDTH:
                token, zs = steered_tile(tile, opened, KL_DIRECTION, ALIGN, TILE)
                best, below, first_best = best_of_tile(token, zs)
                tl.store(fields + BEST_MAX * WIDTH + tile, best)
                tl.store(fields + BEST_TOKEN * WIDTH + tile, first_best.to(tl.float32, bitcast=True))
                tl.store(fields + BEST_TOTAL * WIDTH + tile, tl.sum(exponential(below), 0))
                if not GREEDY:
                    tl.store(fields + MASS * WIDTH + tile, tl.sum(exponential(below * inverse_temperature), 0))
                tile = next_tile(wanted, tile + 1, WIDTH)
        if FINISH and is_last_of_row(record, programs):
            _row, total = load_row(record)
            _best, _top, steered_total, chosen = merge_best(fields, kept if DROP else used, WIDTH)
            store_greedy(token_out_ptr, logprob_out_ptr, row_index, chosen, steered_total, total > 0)


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
    layout: RowLayout,
    mu: float | Tensor,
    temperature: float,
    alpha: float,
    penalty: float,
    direction: str,
    greedy: tuple[Tensor, Tensor] | None = None,
) -> Sampled:
    """Launch the first two passes over all rows (at least one); a temperature of 0 needs no mass.

    `greedy`: (tokens, logprobs) where the best token alone is asked for. Of a row with few kept tiles they are then written.
    """
    pre, ft = layout.tensors
    source, number, per_row = strength_source(mu, ft)
    space = row_statistics(layout, with_kl=False)
    inputs = (pre, ft, space.memory, per_row)
    numbers = (number, log_threshold(alpha), penalty, 1.0 if temperature == 0 else 1.0 / temperature)
    sizes = (space.vocabulary, space.num_tiles)
    constants = {"KL_DIRECTION": direction == KL, "DROP": penalty == -math.inf, "MU": source, **space.constants}
    count, size = groups(space.rows, space.num_tiles)
    launch(
        sample_sums_kernel,
        (space.rows, count, 1),
        (*inputs, *numbers, *(greedy or (None, None)), *sizes, size, 0, layout.of(pre, ft)),
        {"GREEDY": temperature == 0, "FINISH": greedy is not None, **constants},
    )
    return Sampled(inputs, numbers, sizes, constants)


KERNEL_VARIANTS = [
    Variant(
        sample_sums_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (NUMBER.value,), "GREEDY": (True, False)}
        | {"FINISH": (False,)}
        | COMPILED_ROW,
        tensors=2,
    ),
    Variant(
        sample_sums_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (NUMBER.value,), "GREEDY": (True,), "FINISH": (True,)}
        | COMPILED_ROW,
        tensors=2,
    ),
]
