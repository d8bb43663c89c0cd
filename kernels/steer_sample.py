"""steer_sample: one token per row from the steered distribution, nothing of size (..., V), no sort; two launches or three.

1. `row_statistics_kernel`   reads both inputs once                                                      (rows, splits)
2. `sample_sums_kernel`      per tile: best token, steered normaliser, mass at the temperature; greedy: the best token of
                             the row                                                                     (rows, groups)
3. `pick_token_kernel`       sampling: the tile, then the token, where the cumulative mass passes the row's uniform number
                                                                                                         (rows)

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

from svdecode.kernels.kept_sums import NUMBER, PER_ROW, row_strength
from svdecode.kernels.launch import launch
from svdecode.kernels.merged_row import load_row
from svdecode.kernels.row_algebra import (
    INF,
    NEG_INF,
    exponential,
    finite_or_zero,
    shift_outside,
    steered,
    steering,
)
from svdecode.kernels.row_layout import RowLayout, logit_rows, on_device_of
from svdecode.kernels.row_statistics import load_field, load_label, next_tile, open_row, workspace_of
from svdecode.kernels.sample_sums import (
    MASS,
    MOST_LOGPROB,
    NO_TOKEN,
    merge_best,
    sample_sums,
    steered_tile,
)
from svdecode.kernels.settings import UNSPECIALISED
from svdecode.kernels.variants import COMPILED_ROW, Variant

INFINITY_BITS = tl.constexpr(0x7F800000)
NUMBER_OF_TOKENS, MASS_OF_TOKENS = (tl.constexpr(i) for i in range(2))


@triton.jit
def cheaper(
    MEASURE: tl.constexpr, cost_limit, cost_kept, walk, opened, KL_DIRECTION: tl.constexpr, ALIGN: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Number, or mass at the temperature, of the tokens that cost less than cost_limit and at most cost_kept.

    `walk` is (wanted tiles, best zs of the row, 1 / temperature).
    """
    wanted, top, inverse_temperature = walk
    measure = 0.0
    tile = next_tile(wanted, 0, WIDTH)
    while tile < WIDTH:
        _token, zs = steered_tile(tile, opened, KL_DIRECTION, ALIGN, TILE)
        cost = top - zs
        weight = tl.where((cost < cost_limit) & (cost <= cost_kept), 1.0, 0.0)
        if MEASURE == MASS_OF_TOKENS:
            weight *= exponential(-cost * inverse_temperature)
        measure += tl.sum(weight, 0)
        tile = next_tile(wanted, tile + 1, WIDTH)
    return measure


@triton.jit
def largest_cost(
    MEASURE: tl.constexpr, limit, cost_kept, walk, opened, KL_DIRECTION: tl.constexpr, ALIGN: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The largest cost below which the measure stays under a limit, by bisection: a float's bits are ordered as it is."""
    low = 0
    high = INFINITY_BITS + 0
    while low < high:
        middle = low + (high - low + 1) // 2
        cost = middle.to(tl.float32, bitcast=True)
        fits = cheaper(MEASURE, cost, cost_kept, walk, opened, KL_DIRECTION, ALIGN, TILE, WIDTH) < limit
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    return low.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=(*UNSPECIALISED, "top_k"))
def pick_token_kernel(
    pre_ptr,
    ft_ptr,
    workspace_ptr,
    mu_ptr,
    uniform_ptr,
    token_out_ptr,
    logprob_out_ptr,
    mu_number,
    log_alpha,
    penalty,
    inverse_temperature,
    top_p,
    top_k,
    vocabulary,
    num_tiles,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store one row's token and its steered log-probability."""
    row_index = tl.program_id(0)
    record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    used, _maxima, kept, threshold = open_row(fields, num_tiles, log_alpha, WIDTH)
    wanted = kept if DROP else used
    row, total = load_row(record)
    pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
    mu = row_strength(mu_ptr, row_index, mu_number, MU)
    shift = shift_outside(mu, penalty, DROP)
    opened = (pre_row, ft_row, vocabulary, row, threshold, mu, shift)

    best, top, steered_total, _token = merge_best(fields, wanted, WIDTH)
    uniform = tl.load(uniform_ptr + row_index)
    walk = (wanted, top, inverse_temperature)
    cost_kept = float("inf")
    if TOP_K:
        cost_kept = largest_cost(NUMBER_OF_TOKENS, top_k, INF, walk, opened, KL_DIRECTION, ALIGN, TILE, WIDTH)
    if TOP_P:
        mass = cheaper(MASS_OF_TOKENS, INF, cost_kept, walk, opened, KL_DIRECTION, ALIGN, TILE, WIDTH)
        nucleus = largest_cost(MASS_OF_TOKENS, top_p * mass, cost_kept, walk, opened, KL_DIRECTION, ALIGN, TILE, WIDTH)
        cost_kept = tl.minimum(cost_kept, nucleus)

    # Where the cumulative mass passes the target: first the tile, then the token inside it.
    start = 0
    before = 0.0
    end = WIDTH + 0
    if TOP_K or TOP_P:
        mass = cheaper(MASS_OF_TOKENS, INF, cost_kept, walk, opened, KL_DIRECTION, ALIGN, TILE, WIDTH)
        target = uniform * mass
    else:
        index = tl.arange(0, WIDTH)
        masses = load_field(fields, MASS, wanted, 0.0, WIDTH)
        masses *= tl.where(best == NEG_INF, 0.0, exponential((best - finite_or_zero(top)) * inverse_temperature))
        target = uniform * tl.sum(masses, 0)
        last_tile = tl.max(tl.where(masses > 0, index, 0), 0)
        start = tl.minimum(tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0), last_tile)
        before = tl.sum(tl.where(index < start, masses, 0.0), 0)
        end = start + 1
    token = NO_TOKEN + 0
    last = -1
    tile = next_tile(wanted, start, WIDTH)
    while tile < end:
        ids, zs = steered_tile(tile, opened, KL_DIRECTION, ALIGN, TILE)
        cost = top - zs
        weight = tl.where(cost <= cost_kept, exponential(-cost * inverse_temperature), 0.0)
        passed = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
        token = tl.minimum(token, tl.min(tl.where(passed, ids, NO_TOKEN), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, ids, -1), 0))
        before += tl.sum(weight, 0)
        tile = tl.where(token < NO_TOKEN, end, next_tile(wanted, tile + 1, WIDTH))
    token = tl.where(token < NO_TOKEN, token, last)  # rounding left the target just above the whole mass

    in_range, z, a = load_label(pre_row, ft_row, token, vocabulary)
    u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
    logprob = steered(u, delta, z >= threshold, mu, shift) - top - tl.log(steered_total)
    sound = (total > 0) & (logprob <= MOST_LOGPROB) & in_range
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
    rows = tokens.numel()
    if rows == 0:
        return tokens, logprobs
    with on_device_of(ft):
        found = sample_sums(
            layout, mu, temperature, alpha, penalty, direction, (tokens, logprobs) if temperature == 0 else None
        )
        if temperature == 0:
            return tokens, logprobs
        launch(
            pick_token_kernel,
            (rows, 1, 1),
            (
                *(
                    *found.inputs,
                    uniform.reshape(-1).contiguous(),
                    tokens,
                    logprobs,
                    *found.numbers,
                ),
                *(1.0 if top_p is None else top_p, top_k or 0, *found.sizes, 0, layout.of(*layout.tensors)),
            ),
            {
                "TOP_K": top_k is not None and top_k < vocabulary,
                "TOP_P": top_p is not None and top_p < 1,
                **found.constants,
            },
        )
    return tokens, logprobs


KERNEL_VARIANTS = [
    Variant(
        pick_token_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True,), "MU": (NUMBER.value,), "TOP_K": (False,)}
        | {"TOP_P": (False,)}
        | COMPILED_ROW,
        tensors=2,
    ),
    Variant(
        pick_token_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (PER_ROW.value,), "TOP_K": (True,)}
        | {"TOP_P": (True, False)}
        | COMPILED_ROW,
        tensors=2,
    ),
]
