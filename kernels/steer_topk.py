"""steer_topk: the k best tokens of the steered distribution, three launches, nothing of size (..., V), no sort.

1. `row_statistics_kernel`   reads both inputs once                                              (R x splits programs)
2. `sample_sums_kernel`      per split: best token and steered normaliser, as for steer_sample      (R x splits)
3. `pick_best_kernel`        k times: the best of the splits' best tokens, which the next one of its split replaces    (R)

The third reads the tiles of one split again for each token taken, a few kilobytes from the cache, however large K is.
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
    TILE_MAX,
    merge_totals,
    shift_outside,
)
from svdecode.kernels.row_layout import RowLayout, on_device_of, row_start
from svdecode.kernels.row_statistics import load_field, merge_row
from svdecode.kernels.sample_sums import (
    BEST_MAX,
    BEST_TOKEN,
    BEST_TOTAL,
    NO_TOKEN,
    SAMPLE_FIELDS,
    sample_sums,
    steered_tile,
)
from svdecode.kernels.settings import COMPILED_ROW


@triton.jit
def pick_best_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    splits_ptr,
    sums_ptr,
    mu_ptr,
    token_out_ptr,
    logprob_out_ptr,
    mu_number,
    log_alpha,
    penalty,
    count,
    vocabulary,
    num_splits,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store the `count` best tokens of one row and their steered log-probabilities."""
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
    top, steered_total = merge_totals(best, tl.load(sums + BEST_TOTAL * num_splits + split, mask=held, other=0.0))
    normaliser = top + tl.log(steered_total)
    sound = valid & (steered_total > 0) & (steered_total < float("inf"))
    first = tl.load(sums + BEST_TOKEN * num_splits + split, mask=held, other=0.0).to(tl.int32, bitcast=True)
    token = tl.where(held & (best > NEG_INF), first, NO_TOKEN)

    # What this kernel has found in each split so far; nothing before the first time. The first token of a split was found by
    # another kernel, whose zs may differ in the last bit: it is left out by its id.
    found_max = tl.full((SPLITS,), float("inf"), tl.float32)
    found_token = tl.full((SPLITS,), -1, tl.int32)
    out = row64 * count
    for i in range(count):
        top = tl.max(best, 0)
        chosen = tl.min(tl.where(best == top, token, NO_TOKEN), 0)
        some = sound & (chosen < NO_TOKEN)
        tl.store(token_out_ptr + out + i, tl.where(some, chosen, -1).to(tl.int64))
        logprob = tl.where(some, top - normaliser, NEG_INF)
        tl.store(logprob_out_ptr + out + i, tl.where(sound, logprob, float("nan")))

        here = split == chosen // (TILES * TILE)
        gone = tl.min(tl.where(here, first, NO_TOKEN), 0)
        last_max = tl.max(tl.where(here, found_max, NEG_INF), 0)
        last_token = tl.max(tl.where(here, found_token, -1), 0)
        next_max = float("-inf")
        next_token = NO_TOKEN
        for j in range(TILES):
            tile = (chosen // (TILES * TILE)) * TILES + j
            wanted = some & (i + 1 < count) & (tile < num_splits * TILES)
            if DROP:
                wanted = wanted & (
                    tl.load(tiles + TILE_MAX * num_splits * TILES + tile, mask=wanted, other=NEG_INF) >= threshold
                )
            if wanted:
                ids, zs = steered_tile(pre_row, ft_row, tile, vocabulary, row, threshold, mu, shift, KL_DIRECTION, TILE)
                left = ((zs < last_max) | ((zs == last_max) & (ids > last_token))) & (ids != gone)
                zs = tl.where(left, zs, NEG_INF)
                tile_max = tl.max(zs, 0)
                lowest = tl.min(tl.where((zs == tile_max) & (zs > NEG_INF), ids, NO_TOKEN), 0)
                next_token = tl.where(tile_max > next_max, lowest, next_token)  # a tie keeps the lower token
                next_max = tl.maximum(next_max, tile_max)
        best = tl.where(here, next_max, best)
        token = tl.where(here, next_token, token)
        found_max = tl.where(here, next_max, found_max)
        found_token = tl.where(here, next_token, found_token)


def steer_topk(
    logits_pre: Tensor, logits_ft: Tensor, mu: Tensor, k: int, alpha: float, penalty: float, direction: str
) -> tuple[Tensor, Tensor]:
    """(tokens (..., k), logprobs (..., k)); arguments are checked by `svdecode.ops`."""
    shape = logits_ft.shape[:-1]
    layout = RowLayout(logits_pre, logits_ft)
    ft = layout.tensors[1]
    tokens = torch.empty((*shape, k), dtype=torch.int64, device=ft.device)
    logprobs = torch.empty((*shape, k), dtype=torch.float32, device=ft.device)
    rows = shape.numel()
    if rows == 0:
        return tokens, logprobs
    with on_device_of(ft):
        found = sample_sums(layout, mu, 0.0, alpha, penalty, direction)
        *numbers, _temperature = found.numbers
        arguments = (*found.inputs, tokens, logprobs, *numbers, k, *found.sizes)
        launch(pick_best_kernel, (rows,), arguments, found.constants)
    return tokens, logprobs


KERNEL_VARIANTS = [
    (pick_best_kernel, {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (0,)} | COMPILED_ROW, 2),
]
