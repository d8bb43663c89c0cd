"""steer_sample: one token per row from the steered distribution, three launches, nothing of size (..., V), no sort.

1. `row_statistics_kernel`   reads both inputs once                                                   (R x splits programs)
2. `sample_sums_kernel`      per split: best token, steered normaliser, mass at the temperature          (R x splits)
3. `pick_token_kernel`       greedy: the best of the splits. Sampling: the split, then the token, where the cumulative mass
                             passes the row's uniform number                                          (R)

Only tiles with kept tokens are read again (with a finite penalty: all). top_k and top_p are thresholds on the steered logit,
found by bisection on its bits, 31 walks over those tiles, which are a few kilobytes from the cache when K is small. What
decides is the cost v = max(zs) - zs >= 0 of a token: top_k keeps v if fewer than k tokens cost less, top_p keeps v if the
tokens that cost less have less than the mass top_p. Ties stay together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.kernels.kept_sums import PER_ROW
from svdecode.kernels.launch import launch
from svdecode.kernels.row_algebra import (
    MAX,
    NEG_INF,
    SPLIT_FIELDS,
    TILE_FIELDS,
    finite_or_zero,
    merge_totals,
    shift_outside,
    steered,
    steering,
)
from svdecode.kernels.row_layout import RowLayout, on_device_of, row_start
from svdecode.kernels.row_statistics import load_field, merge_row, next_tile, tiles_with_kept
from svdecode.kernels.sample_sums import (
    BEST_MAX,
    BEST_TOKEN,
    BEST_TOTAL,
    MASS,
    NO_TOKEN,
    SAMPLE_FIELDS,
    sample_sums,
    steered_tile,
)
from svdecode.kernels.settings import COMPILED_ROW

INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def cheaper(
    cost_limit, cost_kept, wanted, top, inverse_temperature, pre_row, ft_row, vocabulary, row, threshold, mu, shift,
    COUNT: tl.constexpr, KL_DIRECTION: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Number (COUNT), or mass at the temperature, of the tokens that cost less than cost_limit and at most cost_kept."""
    measure = 0.0
    tile = next_tile(wanted, 0, WIDTH)
    while tile < WIDTH:
        _token, zs = steered_tile(pre_row, ft_row, tile, vocabulary, row, threshold, mu, shift, KL_DIRECTION, TILE)
        cost = top - zs
        weight = tl.where((cost < cost_limit) & (cost <= cost_kept), 1.0, 0.0)
        if not COUNT:
            weight *= tl.exp(-cost * inverse_temperature)
        measure += tl.sum(weight, 0)
        tile = next_tile(wanted, tile + 1, WIDTH)
    return measure


@triton.jit
def pick_token_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    splits_ptr,
    sums_ptr,
    mu_ptr,
    uniform_ptr,
    token_out_ptr,
    logprob_out_ptr,
    mu_number,
    log_alpha,
    penalty,
    inverse_temperature,
    top_k,
    top_p,
    vocabulary,
    num_splits,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store one row's token and its steered log-probability."""
    row_index = tl.program_id(0)
    row64 = row_index.to(tl.int64)
    fields = splits_ptr + row64 * (SPLIT_FIELDS * num_splits)
    maxima = load_field(fields, MAX, num_splits, NEG_INF, SPLITS)
    maximum = tl.max(maxima, 0)
    threshold = maximum + log_alpha
    total, pre_top, centre, valid = merge_row(fields, num_splits, SPLITS)
    row = (maximum, total, pre_top, centre)
    tiles = tiles_ptr + row64 * (TILE_FIELDS * num_splits * TILES)
    sizes, pre_strides, ft_strides = layout
    pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
    ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)
    mu = mu_number
    if MU == PER_ROW:
        mu = tl.load(mu_ptr + row_index)
    shift = shift_outside(mu, penalty, DROP)

    split = tl.arange(0, SPLITS)
    held = split < num_splits
    if DROP:
        held = held & (maxima >= threshold)
    sums = sums_ptr + row64 * (SAMPLE_FIELDS * num_splits)
    best = tl.load(sums + BEST_MAX * num_splits + split, mask=held, other=NEG_INF)
    best_total = tl.load(sums + BEST_TOTAL * num_splits + split, mask=held, other=0.0)
    top, steered_total = merge_totals(best, best_total)
    best_bits = tl.load(sums + BEST_TOKEN * num_splits + split, mask=held, other=0.0)
    best_token = tl.where(held & (best == top), best_bits.to(tl.int32, bitcast=True), NO_TOKEN)
    token = tl.min(best_token, 0)

    WIDTH: tl.constexpr = SPLITS * TILES
    if not GREEDY:
        uniform = tl.load(uniform_ptr + row_index)
        if DROP:
            wanted = tiles_with_kept(tiles, num_splits * TILES, threshold, WIDTH)
        else:
            wanted = tl.arange(0, WIDTH) < num_splits * TILES
        cost_kept = float("inf")
        if TOP_K:
            low = 0
            high = INFINITY_BITS + 0
            while low < high:
                middle = low + (high - low + 1) // 2
                number = cheaper(
                    middle.to(tl.float32, bitcast=True), float("inf"), wanted, top, inverse_temperature, pre_row, ft_row,
                    vocabulary, row, threshold, mu, shift, True, KL_DIRECTION, TILE, WIDTH,
                )  # fmt: skip
                fits = number < top_k
                low = tl.where(fits, middle, low)
                high = tl.where(fits, high, middle - 1)
            cost_kept = low.to(tl.float32, bitcast=True)
        if TOP_P:
            mass = cheaper(
                float("inf"), cost_kept, wanted, top, inverse_temperature, pre_row, ft_row, vocabulary, row, threshold,
                mu, shift, False, KL_DIRECTION, TILE, WIDTH,
            )  # fmt: skip
            low = 0
            high = INFINITY_BITS + 0
            while low < high:
                middle = low + (high - low + 1) // 2
                below = cheaper(
                    middle.to(tl.float32, bitcast=True), cost_kept, wanted, top, inverse_temperature, pre_row, ft_row,
                    vocabulary, row, threshold, mu, shift, False, KL_DIRECTION, TILE, WIDTH,
                )  # fmt: skip
                fits = below < top_p * mass
                low = tl.where(fits, middle, low)
                high = tl.where(fits, high, middle - 1)
            cost_kept = tl.minimum(cost_kept, low.to(tl.float32, bitcast=True))

        # Where the cumulative mass passes the target: first the split, then the token inside it.
        start = 0
        before = 0.0
        end = WIDTH + 0
        if TOP_K or TOP_P:
            mass = cheaper(
                float("inf"), cost_kept, wanted, top, inverse_temperature, pre_row, ft_row, vocabulary, row, threshold,
                mu, shift, False, KL_DIRECTION, TILE, WIDTH,
            )  # fmt: skip
            target = uniform * mass
        else:
            masses = tl.load(sums + MASS * num_splits + split, mask=held, other=0.0)
            masses = masses * tl.where(best == NEG_INF, 0.0, tl.exp((best - finite_or_zero(top)) * inverse_temperature))
            cumulative = tl.cumsum(masses, 0)
            target = uniform * tl.sum(masses, 0)
            last_split = tl.max(tl.where(masses > 0, split, 0), 0)
            chosen = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), 0), last_split)
            before = tl.sum(tl.where(split < chosen, masses, 0.0), 0)
            start = chosen * TILES
            end = start + TILES
        token = NO_TOKEN + 0
        last = -1
        tile = next_tile(wanted, start, WIDTH)
        while tile < end:
            ids, zs = steered_tile(pre_row, ft_row, tile, vocabulary, row, threshold, mu, shift, KL_DIRECTION, TILE)
            cost = top - zs
            weight = tl.where(cost <= cost_kept, tl.exp(-cost * inverse_temperature), 0.0)
            passed = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
            token = tl.minimum(token, tl.min(tl.where(passed, ids, NO_TOKEN), 0))
            last = tl.maximum(last, tl.max(tl.where(weight > 0, ids, -1), 0))
            before += tl.sum(weight, 0)
            tile = tl.where(token < NO_TOKEN, end, next_tile(wanted, tile + 1, WIDTH))
        token = tl.where(token < NO_TOKEN, token, last)  # rounding left the target just above the whole mass

    chosen_z = tl.load(ft_row + token, mask=(token >= 0) & (token < vocabulary), other=NEG_INF).to(tl.float32)
    chosen_a = tl.load(pre_row + token, mask=(token >= 0) & (token < vocabulary), other=NEG_INF).to(tl.float32)
    u, _p, _c, delta = steering(chosen_z, chosen_a, row, KL_DIRECTION)
    logprob = steered(u, delta, chosen_z >= threshold, mu, shift) - top - tl.log(steered_total)
    sound = valid & (logprob <= 0.0001) & (token >= 0) & (token < vocabulary)
    tl.store(token_out_ptr + row_index, tl.where(sound, token, -1).to(tl.int64))
    tl.store(logprob_out_ptr + row_index, tl.where(sound, logprob, float("nan")))


def steer_sample(
    logits_pre: Tensor,
    logits_ft: Tensor,
    mu: Tensor,
    uniform: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    alpha: float,
    penalty: float,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """(tokens, logprobs); arguments are checked by `svdecode.ops`."""
    shape, vocabulary = logits_ft.shape[:-1], logits_ft.shape[-1]
    layout = RowLayout(logits_pre, logits_ft)
    ft = layout.tensors[1]
    tokens = torch.empty(shape, dtype=torch.int64, device=ft.device)
    logprobs = torch.empty(shape, dtype=torch.float32, device=ft.device)
    rows, greedy = tokens.numel(), temperature == 0
    if rows == 0:
        return tokens, logprobs
    with on_device_of(ft):
        found = sample_sums(layout, mu, temperature, alpha, penalty, direction)
        outputs = (None if greedy else uniform.reshape(-1).contiguous(), tokens, logprobs)
        limits = (top_k or 0, 1.0 if top_p is None else top_p)
        launch(
            pick_token_kernel,
            (rows,),
            (*found.inputs, *outputs, *found.numbers, *limits, *found.sizes),
            dict(
                GREEDY=greedy,
                TOP_K=top_k is not None and top_k < vocabulary,
                TOP_P=top_p is not None and top_p < 1,
                **found.constants,
            ),
        )
    return tokens, logprobs


KERNEL_VARIANTS = [
    (
        pick_token_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True,), "MU": (0,), "GREEDY": (True,), "TOP_K": (False,), "TOP_P": (False,)}
        | COMPILED_ROW,
        2,
    ),
    (
        pick_token_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (1,), "GREEDY": (False,), "TOP_K": (True,)}
        | {"TOP_P": (True, False)}
        | COMPILED_ROW,
        2,
    ),
]
