"""steer_topk: the k best tokens of the steered distribution, three launches, nothing of size (..., V), no sort.

1. `row_statistics_kernel`   reads both inputs once                                              (rows, splits)
2. `sample_sums_kernel`      per tile: best token and steered normaliser, as for steer_sample    (rows, groups)
3. `pick_best_kernel`        k times: the best of the tiles' best tokens, which the next one of its tile replaces    (rows)

The third reads one tile again for each token taken, a few kilobytes from the cache, however large K is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.kernels.kept_sums import NUMBER, row_strength
from svdecode.kernels.launch import launch
from svdecode.kernels.merged_row import load_row
from svdecode.kernels.row_algebra import INF, NEG_INF, shift_outside
from svdecode.kernels.row_layout import RowLayout, logit_rows, on_device_of
from svdecode.kernels.row_statistics import load_field, open_row, workspace_of
from svdecode.kernels.sample_sums import BEST_TOKEN, NO_TOKEN, merge_best, sample_sums, steered_tile
from svdecode.kernels.settings import UNSPECIALISED
from svdecode.kernels.variants import COMPILED_ROW, Variant


@triton.jit(do_not_specialize=(*UNSPECIALISED, "count"))
def pick_best_kernel(
    pre_ptr,
    ft_ptr,
    workspace_ptr,
    mu_ptr,
    token_out_ptr,
    logprob_out_ptr,
    mu_number,
    log_alpha,
    penalty,
    count,
    vocabulary,
    num_tiles,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the `count` best tokens of one row and their steered log-probabilities."""
    row_index = tl.program_id(0)
    record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    used, _maxima, kept, threshold = open_row(fields, num_tiles, log_alpha, WIDTH)
    wanted = kept if DROP else used
    row, total = load_row(record)
    pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
    mu = row_strength(mu_ptr, row_index, mu_number, MU)
    opened = (pre_row, ft_row, vocabulary, row, threshold, mu, shift_outside(mu, penalty, DROP))

    index = tl.arange(0, WIDTH)
    best, top, steered_total, _token = merge_best(fields, wanted, WIDTH)
    normaliser = top + tl.log(steered_total)
    sound = (total > 0) & (steered_total > 0) & (steered_total < INF)
    token = load_field(fields, BEST_TOKEN, wanted, 0.0, WIDTH).to(tl.int32, bitcast=True)
    token = tl.where(wanted & (best > NEG_INF), token, NO_TOKEN)

    out = row_index.to(tl.int64) * count
    for i in range(count):
        top = tl.max(best, 0)
        chosen = tl.min(tl.where(best == top, token, NO_TOKEN), 0)
        some = sound & (chosen < NO_TOKEN)
        tl.store(token_out_ptr + out + i, tl.where(some, chosen, -1).to(tl.int64))
        tl.store(logprob_out_ptr + out + i, tl.where(sound, tl.where(some, top - normaliser, NEG_INF), float("nan")))

        next_max = float("-inf")
        next_token = NO_TOKEN
        if some & (i + 1 < count):
            # What is left of its tile: less likely tokens, and those as likely with a higher id.
            ids, zs = steered_tile(chosen // TILE, opened, KL_DIRECTION, ALIGN, TILE)
            zs = tl.where((zs < top) | ((zs == top) & (ids > chosen)), zs, NEG_INF)
            next_max = tl.max(zs, 0)
            next_token = tl.min(tl.where((zs == next_max) & (zs > NEG_INF), ids, NO_TOKEN), 0)
        here = index == chosen // TILE
        best = tl.where(here, next_max, best)
        token = tl.where(here, next_token, token)


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
        launch(
            pick_best_kernel,
            (rows, 1, 1),
            (*found.inputs, tokens, logprobs, *numbers, k, *found.sizes, 0, layout.of(*layout.tensors)),
            found.constants,
        )
    return tokens, logprobs


KERNEL_VARIANTS = [
    Variant(
        pick_best_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (NUMBER.value,)} | COMPILED_ROW,
        tensors=2,
    )
]
