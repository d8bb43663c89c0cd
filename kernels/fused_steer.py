"""fused_steer and optimal_strength: steered log-probs and all row scalars in three launches.

1. `row_statistics_kernel`   reads both inputs once; with a penalty of -inf it fills the output with -inf    (rows, splits)
2. `kept_sums_kernel`        merges each row, and sums over the kept tokens of the tiles that hold one       (rows, groups)
3. `steered_output_kernel`   the scalars, and the log-probs of those tiles                                   (rows, groups)

With a penalty of -inf and no labels step 2 finishes a row with few kept tokens (`held_row.py`), and step 3 has nothing to do.
A peaked row is thus read once and written once. Only the tiles (1024 tokens) that hold kept tokens are read again; K has at
most 1 / (alpha p_max) tokens. With a finite penalty the third pass reads logits_ft again. When mu is the row's own mu_star,
which needs the sums of step 2, that step runs twice: for the moments, then for the normaliser.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode import constants
from svdecode.kernels.arguments import log_threshold, strength_source
from svdecode.kernels.held_row import FINISHED
from svdecode.kernels.kept_sums import (
    COUNT,
    NUMBER,
    OWN,
    STEERED_MAX,
    STEERED_TOTAL,
    kept_field,
    kept_sums_kernel,
    label_moments,
    optimal_mu,
    row_strength,
)
from svdecode.kernels.launch import launch
from svdecode.kernels.merged_row import ROW_TILES, load_row
from svdecode.kernels.row_algebra import (
    NEG_INF,
    add_totals,
    merge_totals,
    shift_outside,
    steered,
    steering,
)
from svdecode.kernels.row_layout import RowLayout, logit_rows, on_device_of, row_pointer, within
from svdecode.kernels.row_statistics import (
    FEW_TILES,
    MAX,
    TOTAL,
    load_field,
    load_tile,
    next_tile,
    of_group,
    open_row,
    row_statistics,
    store_kept,
    workspace_of,
)
from svdecode.kernels.saved_row import save_row
from svdecode.kernels.settings import TILES, UNSPECIALISED, groups
from svdecode.kernels.variants import COMPILED_ROW, Variant


@triton.jit(do_not_specialize=UNSPECIALISED)
def steered_output_kernel(
    pre_ptr,
    ft_ptr,
    workspace_ptr,
    mu_ptr,
    label_ptr,
    out_ptr,
    mu_out_ptr,
    count_out_ptr,
    mu_star_out_ptr,
    moments_out_ptr,
    saved_out_ptr,
    mu_number,
    log_alpha,
    penalty,
    eps,
    vocabulary,
    num_tiles,
    group_size,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    LABELS: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the log-probs of a group's tiles, which with DROP are those with kept tokens; a row's first program its scalars."""
    row_index = tl.program_id(0)
    group = tl.program_id(1)
    record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    has_work = group == 0
    if DROP:  # few tiles are all the first program's: the others need not look for theirs
        tiles = tl.load(record + ROW_TILES)
        has_work = (has_work | (tiles > FEW_TILES)) & (tiles != FINISHED)
    if (not DROP) or has_work:
        used, maxima, kept, threshold = open_row(fields, num_tiles, log_alpha, WIDTH)
        wanted = of_group(kept if DROP else used, group, group_size, WIDTH)
        tile = next_tile(wanted, 0, WIDTH)
        if (tile < WIDTH) | (group == 0):
            pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
            row, total = load_row(record)
            maximum, _inverse, _pre_top, _centre = row
            nan_unless_valid = total - total
            mean = 0.0
            mu = row_strength(mu_ptr, row_index, mu_number, MU)
            if LABELS:
                label = tl.load(label_ptr + row_index)
                n, d, h, mean = label_moments(
                    record, fields, kept, pre_row, ft_row, label, threshold, row, vocabulary, KL_DIRECTION, WIDTH
                )
                mu_star = optimal_mu(n, d, label, eps)
                if MU == OWN:
                    mu = mu_star
                if group == 0:
                    tl.store(mu_star_out_ptr + row_index, mu_star + nan_unless_valid)
                    moments = moments_out_ptr + row_index.to(tl.int64) * 3
                    tl.store(moments, n + nan_unless_valid)
                    tl.store(moments + 1, d + nan_unless_valid)
                    tl.store(moments + 2, h + nan_unless_valid)
            shift = shift_outside(mu, penalty, DROP)
            normaliser = 0.0
            if DENSE:
                top, mass = merge_totals(
                    load_field(fields, STEERED_MAX, kept, NEG_INF, WIDTH),
                    load_field(fields, STEERED_TOTAL, kept, 0.0, WIDTH),
                )
                if not DROP:
                    outside_max, outside_mass = merge_totals(
                        tl.where(used & (maxima < threshold), maxima - maximum + shift, NEG_INF),
                        load_field(fields, TOTAL, used, 0.0, WIDTH),
                    )
                    top, mass = add_totals(top, mass, outside_max, outside_mass)
                normaliser = top + tl.log(mass) + nan_unless_valid
            if group == 0:
                count = kept_field(fields, COUNT, kept, WIDTH)
                tl.store(count_out_ptr + row_index, tl.where(total > 0, count, 0.0).to(tl.int32))
                tl.store(mu_out_ptr + row_index, mu + nan_unless_valid)
                save_row(saved_out_ptr, row_index, row, total, normaliser, mean)
            if DENSE:
                out_row = row_pointer(out_ptr, row_index, layout[0], layout[3], zero, ALIGN)
                if total > 0:
                    while tile < WIDTH:
                        if DROP or tl.load(fields + MAX * WIDTH + tile) >= threshold:
                            token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, ALIGN, TILE)
                            u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
                            zs = steered(u, delta, z >= threshold, mu, shift)
                            keep = (z >= threshold) & inside
                            if DROP:
                                store_kept(out_row + token, zs - normaliser, keep, inside)
                            else:
                                tl.store(out_row + token, zs - normaliser, mask=inside)
                        else:
                            token = tile * TILE + tl.arange(0, TILE)
                            inside = within(token, vocabulary, ALIGN)
                            z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
                            tl.store(out_row + token, z - maximum + shift - normaliser, mask=inside)
                        tile = next_tile(wanted, tile + 1, WIDTH)
                elif group == 0:  # the row's first program overwrites all of it
                    for i in range(num_tiles):
                        token = i * TILE + tl.arange(0, TILE)
                        tl.store(
                            out_row + token,
                            tl.full([TILE], float("nan"), tl.float32),
                            mask=within(token, vocabulary, ALIGN),
                        )


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
    shape, device = logits_ft.shape[:-1], logits_ft.device
    float32 = torch.float32
    logprobs = out
    if out is None and dense:
        logprobs = torch.empty(logits_ft.shape, dtype=float32, device=device)
    used = torch.empty(shape, dtype=float32, device=device)
    num_kept = torch.empty_like(used, dtype=torch.int32)
    kl = torch.empty_like(used) if return_kl else None
    mu_star = moments = None
    if labels is not None:
        mu_star = torch.empty_like(used)
        moments = torch.empty((*shape, 3), dtype=float32, device=device)
        labels = labels.reshape(-1).contiguous()
    saved = torch.empty((*shape, constants.SAVED_FIELDS), dtype=float32, device=device)
    if used.numel() == 0:
        return logprobs, used, num_kept, kl, mu_star, moments, saved
    layout = RowLayout(logits_pre, logits_ft, logprobs) if dense else RowLayout(logits_pre, logits_ft)
    pre, ft = layout.tensors[:2]
    target = layout.tensors[2] if dense else None
    drop = penalty == -math.inf
    source, number, per_row = strength_source(mu, ft)
    numbers = (number, log_threshold(alpha), penalty, eps)
    with on_device_of(ft):
        space = row_statistics(layout, return_kl, target, -math.inf if dense and drop else None)
        constant = {"KL_DIRECTION": direction == constants.KL, "DROP": drop, "MU": source, **space.constants}
        count, size = groups(space.rows, space.num_tiles)
        finish = dense and drop and labels is None
        passes = [(True, False), (False, dense)] if source == OWN.value else [(True, dense)]
        for sums, steer in passes:
            if sums or steer:
                launch(
                    kept_sums_kernel,
                    (space.rows, count, 1),
                    (
                        *(pre, ft, space.memory, per_row, labels, kl, target, used, num_kept, saved, *numbers),
                        *(space.vocabulary, space.num_tiles, size, 0, layout.of(pre, ft, target if dense else ft)),
                    ),
                    {"SUMS": sums, "STEER": steer, "WITH_KL": sums and return_kl, "FINISH": finish, **constant},
                )
        if not dense:
            count, size = 1, space.num_tiles
        elif not drop:
            count, size = space.splits, TILES
        launch(
            steered_output_kernel,
            (space.rows, count, 1),
            (
                *(pre, ft, space.memory, per_row, labels, target, used, num_kept, mu_star, moments, saved, *numbers),
                *(space.vocabulary, space.num_tiles, size, 0, layout.of(pre, ft, target if dense else ft)),
            ),
            {"LABELS": labels is not None, "DENSE": dense, **constant},
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
    Variant(
        steered_output_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (NUMBER.value, OWN.value), "LABELS": (True,)}
        | {"DENSE": (True, False)}
        | COMPILED_ROW,
        tensors=3,
    )
]
