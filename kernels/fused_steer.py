"""fused_steer and optimal_strength: steered log-probs and all row scalars in three launches.

1. `row_statistics_kernel`   reads both inputs once                                                   (R x splits programs)
2. `kept_sums_kernel`        sums over the kept tokens of the tiles that hold one; with a penalty of -inf it also
                             fills every split without a kept token with -inf                        (R x splits)
3. `steered_output_kernel`   log-probs of what is left, and the scalars                  (R x splits; R without log-probs)

With a penalty of -inf a peaked row is thus read once and written once. Only the tiles (1024 tokens) that hold kept tokens
are read again; K has at most 1 / (alpha p_max) tokens. With a finite penalty the third pass reads logits_ft again. When mu
is the row's own mu_star, which needs the sums of step 2, that step runs twice: for the moments, then for the normaliser.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode import constants
from svdecode.kernels.arguments import log_threshold, strength_source
from svdecode.kernels.kept_sums import (
    COUNT,
    KEPT_FIELDS,
    OWN,
    PER_ROW,
    ROW_CENTRE,
    ROW_MU,
    ROW_PRE_TOP,
    ROW_TOTAL,
    STEERED_MAX,
    STEERED_TOTAL,
    kept_field,
    kept_sums_kernel,
    label_moments,
    optimal_mu,
)
from svdecode.kernels.launch import launch
from svdecode.kernels.row_algebra import (
    MAX,
    NEG_INF,
    SPLIT_FIELDS,
    TILE_FIELDS,
    TILE_MAX,
    TOTAL,
    add_totals,
    merge_totals,
    shift_outside,
    steered,
    steering,
)
from svdecode.kernels.row_layout import RowLayout, on_device_of, row_start
from svdecode.kernels.row_statistics import load_field, load_tile, merge_row, row_kl, row_statistics
from svdecode.kernels.settings import COMPILED_ROW, LAUNCH, TILE, TILES, next_power_of_2, splits

# What the backward needs of a row, beside its logits.
SAVED_MAXIMUM, SAVED_TOTAL, SAVED_PRE_TOP, SAVED_CENTRE, SAVED_NORMALISER, SAVED_MEAN = (
    tl.constexpr(i) for i in range(6)
)
SAVED_FIELDS = tl.constexpr(constants.SAVED_FIELDS)


@triton.jit
def steered_output_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    splits_ptr,
    kept_ptr,
    mu_ptr,
    label_ptr,
    out_ptr,
    mu_out_ptr,
    count_out_ptr,
    kl_out_ptr,
    mu_star_out_ptr,
    moments_out_ptr,
    saved_out_ptr,
    mu_number,
    log_alpha,
    penalty,
    eps,
    vocabulary,
    num_splits,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    LABELS: tl.constexpr,
    WITH_KL: tl.constexpr,
    DENSE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write the log-probs of one split; a row's first program merges everything and stores its scalars."""
    program = tl.program_id(0)
    row_index = program
    split = 0
    if DENSE:
        row_index = program // num_splits
        split = program % num_splits
    row64 = row_index.to(tl.int64)
    fields = splits_ptr + row64 * (SPLIT_FIELDS * num_splits)
    maxima = load_field(fields, MAX, num_splits, NEG_INF, SPLITS)
    maximum = tl.max(maxima, 0)
    threshold = maximum + log_alpha
    kept = maxima >= threshold
    own_kept = tl.load(fields + MAX * num_splits + split) >= threshold
    kept_fields = kept_ptr + row64 * (KEPT_FIELDS * num_splits)
    sizes, pre_strides, ft_strides, out_strides = layout
    pre_row = pre_ptr + row_start(row_index, sizes, pre_strides)
    ft_row = ft_ptr + row_start(row_index, sizes, ft_strides)

    total = float("nan")
    pre_top = 0.0
    centre = 0.0
    mean = 0.0
    mu = mu_number
    if MU == PER_ROW:
        mu = tl.load(mu_ptr + row_index)
    first = split == 0
    if (not DROP) or first:
        total, pre_top, centre, valid = merge_row(fields, num_splits, SPLITS)
        if LABELS:
            label = tl.load(label_ptr + row_index)
            n, d, h, mean = label_moments(
                kept_fields, kept, maxima, fields, num_splits, pre_row, ft_row, label, threshold,
                (maximum, total, pre_top, centre), vocabulary, KL_DIRECTION, SPLITS,
            )  # fmt: skip
            mu_star = optimal_mu(n, d, label, eps)
            if MU == OWN:
                mu = mu_star
        if first:
            nan_unless_valid = tl.where(valid, 0.0, float("nan"))
            count = kept_field(kept_fields, COUNT, kept, num_splits, SPLITS)
            tl.store(count_out_ptr + row_index, tl.where(valid, count, 0.0).to(tl.int32))
            tl.store(mu_out_ptr + row_index, mu + nan_unless_valid)
            if WITH_KL:
                kl = row_kl(fields, num_splits, total, pre_top, centre, SPLITS)
                tl.store(kl_out_ptr + row_index, kl + nan_unless_valid)
            if LABELS:
                tl.store(mu_star_out_ptr + row_index, mu_star + nan_unless_valid)
                tl.store(moments_out_ptr + row64 * 3, n + nan_unless_valid)
                tl.store(moments_out_ptr + row64 * 3 + 1, d + nan_unless_valid)
                tl.store(moments_out_ptr + row64 * 3 + 2, h + nan_unless_valid)
            saved = saved_out_ptr + row64 * SAVED_FIELDS
            tl.store(saved + SAVED_MAXIMUM, maximum)
            tl.store(saved + SAVED_TOTAL, total + nan_unless_valid)
            tl.store(saved + SAVED_PRE_TOP, pre_top)
            tl.store(saved + SAVED_CENTRE, centre)
            tl.store(saved + SAVED_MEAN, mean)
            if not DENSE:
                tl.store(saved + SAVED_NORMALISER, 0.0)
        total = tl.where(valid, total, float("nan"))
    elif own_kept:
        total = tl.load(kept_fields + ROW_TOTAL * num_splits + split)
        pre_top = tl.load(kept_fields + ROW_PRE_TOP * num_splits + split)
        centre = tl.load(kept_fields + ROW_CENTRE * num_splits + split)
        mu = tl.load(kept_fields + ROW_MU * num_splits + split)

    if DENSE:
        out_row = out_ptr + row_start(row_index, sizes, out_strides)
        tiles = tiles_ptr + row64 * (TILE_FIELDS * num_splits * TILES)
        is_nan_row = total != total
        if first or own_kept or not DROP:
            top, mass = merge_totals(
                tl.where(kept, load_field(kept_fields, STEERED_MAX, num_splits, NEG_INF, SPLITS), NEG_INF),
                tl.where(kept, load_field(kept_fields, STEERED_TOTAL, num_splits, 0.0, SPLITS), 0.0),
            )
            shift = shift_outside(mu, penalty, DROP)
            if not DROP:
                outside_max, outside_mass = merge_totals(
                    tl.where(kept, NEG_INF, maxima - maximum + shift),
                    load_field(fields, TOTAL, num_splits, 0.0, SPLITS),
                )
                top, mass = add_totals(top, mass, outside_max, outside_mass)
            normaliser = top + tl.log(mass) + (total - total)  # NaN for a row that is not valid
            if first:
                tl.store(saved_out_ptr + row64 * SAVED_FIELDS + SAVED_NORMALISER, normaliser)
            if DROP and is_nan_row:
                # Splits without a kept token hold -inf already, so the row's first program alone overwrites all of it.
                if first:
                    for i in range(num_splits * TILES):
                        token = i * TILE + tl.arange(0, TILE)
                        tl.store(out_row + token, tl.full([TILE], float("nan"), tl.float32), mask=token < vocabulary)
            elif own_kept or not DROP:
                row = (maximum, total, pre_top, centre)
                for i in range(TILES):
                    tile = split * TILES + i
                    token = tile * TILE + tl.arange(0, TILE)
                    inside = token < vocabulary
                    if tl.load(tiles + TILE_MAX * num_splits * TILES + tile) >= threshold:
                        _token, _inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, TILE)
                        u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
                        tl.store(
                            out_row + token, steered(u, delta, z >= threshold, mu, shift) - normaliser, mask=inside
                        )
                    elif DROP:
                        tl.store(out_row + token, tl.full([TILE], float("-inf"), tl.float32), mask=inside)
                    else:
                        z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
                        tl.store(out_row + token, z - maximum + shift - normaliser, mask=inside)


def fused_steer(
    logits_pre: Tensor,
    logits_ft: Tensor,
    mu: Tensor | None,
    labels: Tensor | None,
    alpha: float,
    penalty: float,
    direction: str,
    eps: float,
    return_kl: bool,
    out: Tensor | None = None,
    save: bool = True,
    dense: bool = True,
) -> tuple[Tensor | None, ...]:
    """(logprobs, mu, num_kept, kl, mu_star, moments, saved); arguments are checked by `svdecode.ops`.

    dense=False leaves the log-probs out. `saved` (..., SAVED_FIELDS) is for the backward; it is written without `save` too.
    """
    shape, vocabulary = logits_ft.shape[:-1], logits_ft.shape[-1]

    def new(*trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((*shape, *trailing), dtype=dtype, device=logits_ft.device)

    logprobs = out if out is not None else (new(vocabulary) if dense else None)
    layout = RowLayout(logits_pre, logits_ft, *([logprobs] if dense else []))
    pre, ft, *written = layout.tensors
    target = written[0] if dense else None
    used, num_kept = new(), new(dtype=torch.int32)
    kl = new() if return_kl else None
    mu_star, moments = (new(), new(3)) if labels is not None else (None, None)
    saved = new(SAVED_FIELDS.value)
    rows, num_splits = used.numel(), splits(vocabulary)
    if rows == 0:
        return logprobs, used, num_kept, kl, mu_star, moments, saved
    source, number, per_row = strength_source(mu, ft)
    drop = penalty == -math.inf
    with on_device_of(ft):
        statistics = row_statistics(pre, ft, layout, return_kl)
        kept = torch.empty((rows, KEPT_FIELDS.value, num_splits), dtype=torch.float32, device=ft.device)
        labels = None if labels is None else labels.reshape(-1).contiguous()
        inputs = (pre, ft, *statistics, kept, per_row, labels, target)
        # Without log-probs the third stride is that of an input; the kernels do not use it.
        numbers = (
            *(number, log_threshold(alpha), penalty, eps, vocabulary, num_splits),
            layout.of(pre, ft, target if dense else ft),
        )
        shared = dict(
            KL_DIRECTION=direction == constants.KL,
            DROP=drop,
            MU=source,
            TILES=TILES,
            TILE=TILE,
            SPLITS=next_power_of_2(num_splits),
            **LAUNCH,
        )
        passes = [(True, False), (False, dense)] if source == OWN.value else [(True, dense)]
        for sums, steer in passes:
            if sums or steer:
                flags = dict(SUMS=sums, STEER=steer, FILL=steer and drop)
                launch(kept_sums_kernel, (rows * num_splits,), (*inputs, *numbers), flags | shared)
        launch(
            steered_output_kernel,
            (rows * num_splits if dense else rows,),
            (*inputs, used, num_kept, kl, mu_star, moments, saved, *numbers),
            dict(LABELS=labels is not None, WITH_KL=return_kl, DENSE=dense, **shared),
        )
    if dense and target is not logprobs:  # an `out` that only a copy could be laid out with
        logprobs.copy_(target)
    return logprobs, used, num_kept, kl, mu_star, moments, saved


def optimal_strength(
    logits_pre: Tensor, logits_ft: Tensor, labels: Tensor, alpha: float, direction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(mu_star, moments, saved): the row scalars of `fused_steer` alone; nothing of size (..., V) is written."""
    out = fused_steer(
        logits_pre, logits_ft, 0.0, labels, alpha, -math.inf, direction, eps, return_kl=False, dense=False
    )
    return out[4:]


KERNEL_VARIANTS = [
    (
        steered_output_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (0, 2), "LABELS": (True,), "WITH_KL": (True,)}
        | {"DENSE": (True, False)}
        | COMPILED_ROW,
        3,
    ),
]
