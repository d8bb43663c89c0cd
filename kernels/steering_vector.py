"""steering_vector: delta on K, 0 elsewhere, two launches: the statistics with a fill of 0, then delta of the kept tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.constants import KL, SAVED_FIELDS
from svdecode.kernels.arguments import log_threshold
from svdecode.kernels.launch import launch
from svdecode.kernels.merged_row import merge_row
from svdecode.kernels.row_algebra import steering
from svdecode.kernels.row_layout import RowLayout, logit_rows, on_device_of, row_pointer, within
from svdecode.kernels.row_statistics import (
    load_tile,
    next_tile,
    of_group,
    open_row,
    row_statistics,
    store_kept,
    workspace_of,
)
from svdecode.kernels.saved_row import save_row
from svdecode.kernels.settings import UNSPECIALISED, groups
from svdecode.kernels.variants import COMPILED_ROW, Variant


@triton.jit(do_not_specialize=UNSPECIALISED)
def steering_vector_kernel(
    pre_ptr,
    ft_ptr,
    workspace_ptr,
    out_ptr,
    saved_out_ptr,
    log_alpha,
    vocabulary,
    num_tiles,
    group_size,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write delta of a group's tiles with kept tokens; NaN into all of a row that is not valid."""
    row_index = tl.program_id(0)
    group = tl.program_id(1)
    _record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    used, maxima, kept, threshold = open_row(fields, num_tiles, log_alpha, WIDTH)
    own = of_group(kept, group, group_size, WIDTH)
    tile = next_tile(own, 0, WIDTH)
    if (tile < WIDTH) | (group == 0):
        row, total, _kl, _top_excluded, valid = merge_row(fields, used, maxima, False, WIDTH)
        pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
        out_row = row_pointer(out_ptr, row_index, layout[0], layout[3], zero, ALIGN)
        if group == 0:
            save_row(saved_out_ptr, row_index, row, tl.where(valid, total, float("nan")), 0.0, 0.0)
        if valid:
            while tile < WIDTH:
                token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, ALIGN, TILE)
                _u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
                keep = (z >= threshold) & inside
                store_kept(out_row + token, tl.where(keep, delta, 0.0), keep, inside)
                tile = next_tile(own, tile + 1, WIDTH)
        elif group == 0:
            for i in range(num_tiles):
                token = i * TILE + tl.arange(0, TILE)
                tl.store(
                    out_row + token, tl.full([TILE], float("nan"), tl.float32), mask=within(token, vocabulary, ALIGN)
                )


def steering_vector(logits_pre: Tensor, logits_ft: Tensor, alpha: float, direction: str) -> tuple[Tensor, Tensor]:
    """(delta (..., V), saved for the backward); arguments are checked by `svdecode.ops`."""
    shape, device = logits_ft.shape, logits_ft.device
    delta = torch.empty(shape, dtype=torch.float32, device=device)
    saved = torch.empty((*shape[:-1], SAVED_FIELDS), dtype=torch.float32, device=device)
    if delta.numel() == 0:
        return delta, saved
    layout = RowLayout(logits_pre, logits_ft, delta)
    pre, ft, out = layout.tensors
    with on_device_of(ft):
        space = row_statistics(layout, with_kl=False, out=out, fill=0.0)
        count, size = groups(space.rows, space.num_tiles)
        launch(
            steering_vector_kernel,
            (space.rows, count, 1),
            (
                *(pre, ft, space.memory, out, saved, log_threshold(alpha)),
                *(space.vocabulary, space.num_tiles, size, 0, layout.of(pre, ft, out)),
            ),
            {"KL_DIRECTION": direction == KL, **space.constants},
        )
    return delta, saved


KERNEL_VARIANTS = [Variant(steering_vector_kernel, {"KL_DIRECTION": (True, False)} | COMPILED_ROW, tensors=3)]
