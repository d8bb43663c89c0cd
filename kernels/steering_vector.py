"""steering_vector: delta on K, 0 elsewhere, two launches: the statistics, then a write that reads again what it needs."""

from __future__ import annotations

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
from svdecode.kernels.launch import launch
from svdecode.kernels.row_algebra import MAX, NEG_INF, SPLIT_FIELDS, TILE_FIELDS, TILE_MAX, steering
from svdecode.kernels.row_layout import RowLayout, on_device_of, row_start
from svdecode.kernels.row_statistics import load_field, load_tile, merge_row, row_statistics
from svdecode.kernels.settings import LAUNCH, TILE, TILES, next_power_of_2, splits


@triton.jit
def steering_vector_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    splits_ptr,
    out_ptr,
    saved_out_ptr,
    log_alpha,
    vocabulary,
    num_splits,
    layout,
    KL_DIRECTION: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write delta of one split."""
    program = tl.program_id(0)
    row_index = program // num_splits
    split = program % num_splits
    row64 = row_index.to(tl.int64)
    fields = splits_ptr + row64 * (SPLIT_FIELDS * num_splits)
    tiles = tiles_ptr + row64 * (TILE_FIELDS * num_splits * TILES)
    sizes, pre_strides, ft_strides, out_strides = layout
    pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
    ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)
    out_row = out_ptr + row_start(row_index, sizes, out_strides)
    maximum = tl.max(load_field(fields, MAX, num_splits, NEG_INF, SPLITS), 0)
    threshold = maximum + log_alpha
    total, pre_top, centre, valid = merge_row(fields, num_splits, SPLITS)
    row = (maximum, total, pre_top, centre)
    zero = tl.where(valid, 0.0, float("nan"))
    if split == 0:
        saved = saved_out_ptr + row64 * SAVED_FIELDS
        tl.store(saved + SAVED_MAXIMUM, maximum)
        tl.store(saved + SAVED_TOTAL, total + zero)
        tl.store(saved + SAVED_PRE_TOP, pre_top)
        tl.store(saved + SAVED_CENTRE, centre)
        tl.store(saved + SAVED_NORMALISER, 0.0)
        tl.store(saved + SAVED_MEAN, 0.0)
    for i in range(TILES):
        tile = split * TILES + i
        token = tile * TILE + tl.arange(0, TILE)
        if tl.load(tiles + TILE_MAX * num_splits * TILES + tile) >= threshold:
            _token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, TILE)
            _u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
            tl.store(out_row + token, tl.where(z >= threshold, delta, 0.0) + zero, mask=inside)
        else:
            tl.store(out_row + token, tl.zeros([TILE], tl.float32) + zero, mask=token < vocabulary)


def steering_vector(logits_pre: Tensor, logits_ft: Tensor, alpha: float, direction: str) -> tuple[Tensor, Tensor]:
    """(delta (..., V), saved for the backward); arguments are checked by `svdecode.ops`."""
    shape, vocabulary = logits_ft.shape[:-1], logits_ft.shape[-1]
    delta = torch.empty(logits_ft.shape, dtype=torch.float32, device=logits_ft.device)
    saved = torch.empty((*shape, SAVED_FIELDS.value), dtype=torch.float32, device=logits_ft.device)
    layout = RowLayout(logits_pre, logits_ft, delta)
    pre, ft, out = layout.tensors
    num_splits = splits(vocabulary)
    if delta.numel() == 0:
        return delta, saved
    with on_device_of(ft):
        statistics = row_statistics(pre, ft, layout, with_kl=False)
        sizes = (log_threshold(alpha), vocabulary, num_splits, layout.of(pre, ft, out))
        launch(
            steering_vector_kernel,
            (saved.numel() // SAVED_FIELDS.value * num_splits,),
            (pre, ft, *statistics, out, saved, *sizes),
            dict(
                KL_DIRECTION=direction == KL,
                TILES=TILES,
                TILE=TILE,
                SPLITS=next_power_of_2(num_splits),
                **LAUNCH,
            ),
        )
    return delta, saved


KERNEL_VARIANTS = [
    (
        steering_vector_kernel,
        {"KL_DIRECTION": (True, False), "TILES": (TILES,), "TILE": (TILE,), "SPLITS": (32,)},
        3,
    )
]
