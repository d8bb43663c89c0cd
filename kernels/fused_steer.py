"""fused_steer: steered log-probs and all row scalars, three launches.

1. `row_statistics_kernel`   read both inputs once                                         (R x splits programs)
2. `kept_sums_kernel`        sums over the kept tokens of the tiles that hold one; with a penalty of -inf, every
                             split without a kept token is filled with -inf here            (R x splits)
3. `steered_output_kernel`   log-probs of what is left, and the scalars                     (R x splits, or R without log-probs)

With a penalty of -inf a peaked row is thus read once and written once; what is read again are the tiles (1024 tokens) that
hold kept tokens, |K| <= 1 / (alpha p_max) tokens in all. With a finite penalty the third pass reads logits_ft again. When mu
is the row's own mu_star, which needs the sums of step 2, that step runs twice: for the moments, then for the normaliser.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.constants import IGNORE_INDEX, KL
from svdecode.kernels.row_algebra import (
    COUNT,
    KEPT_FIELDS,
    MAX,
    MEAN,
    NEG_INF,
    OUTSIDE,
    ROW_CENTRE,
    ROW_PRE_TOP,
    ROW_TOTAL,
    SQUARES,
    STEERED_MAX,
    STEERED_TOTAL,
    TILE_FIELDS,
    TOTAL,
    WEIGHTED_SQUARES,
    add_totals,
    finite_or_zero,
    log_total,
    merge_totals,
    scale_to,
    shift_outside,
    steered,
    steering,
)
from svdecode.kernels.row_layout import on_device_of, row_layout, row_start
from svdecode.kernels.row_statistics import load_field, merge_row, row_kl, row_statistics
from svdecode.kernels.settings import NUM_WARPS, TILE, TILES, next_power_of_2, splits

NUMBER, PER_ROW, OWN = (tl.constexpr(i) for i in range(3))  # where a row's mu comes from
IGNORE = tl.constexpr(IGNORE_INDEX)


@triton.jit
def kept_field(kept_fields, FIELD: tl.constexpr, kept, num_splits, SPLITS: tl.constexpr):
    """Sum over the splits of a row, in their order, of a kept sum; splits without a kept token hold nothing."""
    return tl.sum(tl.where(kept, load_field(kept_fields, FIELD, num_splits, 0.0, SPLITS), 0.0), 0)


@triton.jit
def pre_topelta(total, centre, KL_DIRECTION: tl.constexpr):
    """delta of the row's top token, where p = 1 / total and c = -centre."""
    if KL_DIRECTION:
        delta = -centre / total
    else:
        delta = -centre
    return delta


@triton.jit
def label_moments(
    kept_fields, kept, fields, num_splits, pre_row, ft_row, label, maximum, threshold, total, pre_top, centre, vocabulary,
    KL_DIRECTION: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """N, D, H of a row (method, section 2), from its kept sums and the label's own delta.

    Delta is taken relative to r, that of the top token: with x = delta - r, X = sum_K p x, Q = 1 - sum_K p,
        N = (delta_y or 0) - r - X + r Q      H = sum_K p x^2 - X^2 + 2 r X Q + r^2 Q (1 - Q)
    which lose no digits where one token has nearly all the mass. Q itself is a sum over the tokens outside K.
    """
    r = pre_topelta(total, centre, KL_DIRECTION)
    width = num_splits * TILES
    tile_max = load_field(fields, MAX, width, NEG_INF, SPLITS * TILES)
    tile_total = load_field(fields, TOTAL, width, 0.0, SPLITS * TILES)
    outside_tiles = tl.where(tile_max >= threshold, 0.0, tile_total * scale_to(tile_max, maximum))
    q = kept_field(kept_fields, OUTSIDE, kept, num_splits, SPLITS) + tl.sum(outside_tiles, 0) / total
    mean = kept_field(kept_fields, MEAN, kept, num_splits, SPLITS)
    squares = kept_field(kept_fields, SQUARES, kept, num_splits, SPLITS)
    weighted = kept_field(kept_fields, WEIGHTED_SQUARES, kept, num_splits, SPLITS)
    in_range = (label >= 0) & (label < vocabulary)
    z = tl.load(ft_row + label, mask=in_range, other=NEG_INF).to(tl.float32)
    a = tl.load(pre_row + label, mask=in_range, other=NEG_INF).to(tl.float32)
    _, _, delta = steering(z, a, maximum, total, pre_top, centre, KL_DIRECTION)
    outside = tl.where(label == IGNORE, 0.0, float("nan"))  # an out-of-range label shows as NaN
    n = tl.where(in_range, tl.where(z >= threshold, delta, 0.0) - r - mean + r * q, outside)
    d = tl.where(in_range, squares, outside)
    variance = weighted - mean * mean + 2 * r * mean * q + r * r * q * (1 - q)
    h = tl.where(in_range, tl.maximum(variance, 0.0), outside)
    return n, d, h


@triton.jit
def optimal_mu(n, d, label, eps):
    """mu* = N / (D + eps), 0 for an ignored label whatever eps is."""
    return tl.where(label == IGNORE, 0.0, n / (d + eps))


@triton.jit
def kept_sums_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    split_max_ptr,
    kept_ptr,
    mu_ptr,
    label_ptr,
    out_ptr,
    mu_number,
    log_alpha,
    penalty,
    eps,
    vocabulary,
    num_splits,
    size1,
    size2,
    pre_stride0,
    pre_stride1,
    pre_stride2,
    ft_stride0,
    ft_stride1,
    ft_stride2,
    out_stride0,
    out_stride1,
    out_stride2,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MU: tl.constexpr,
    SUMS: tl.constexpr,
    STEER: tl.constexpr,
    FILL: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // num_splits
    split = program % num_splits
    row64 = row.to(tl.int64)
    split_max = load_field(split_max_ptr + row64 * num_splits, 0, num_splits, NEG_INF, SPLITS)
    maximum = tl.max(split_max, 0)
    threshold = maximum + log_alpha
    own_max = tl.load(split_max_ptr + row64 * num_splits + split)
    if own_max >= threshold:
        width = num_splits * TILES
        fields = tiles_ptr + row64 * (TILE_FIELDS * width)
        total, pre_top, centre, valid = merge_row(fields, width, SPLITS * TILES)
        pre_row = pre_ptr + row_start(row, size1, size2, pre_stride0, pre_stride1, pre_stride2)
        ft_row = ft_ptr + row_start(row, size1, size2, ft_stride0, ft_stride1, ft_stride2)
        kept_fields = kept_ptr + row64 * (KEPT_FIELDS * num_splits)
        own_fields = kept_fields + split
        if MU == OWN:
            mu = mu_number
            if STEER:
                label = tl.load(label_ptr + row)
                n, d, _ = label_moments(
                    kept_fields, split_max >= threshold, fields, num_splits, pre_row, ft_row, label, maximum,
                    threshold, total, pre_top, centre, vocabulary, KL_DIRECTION, SPLITS, TILES,
                )  # fmt: skip
                mu = optimal_mu(n, d, label, eps)
        elif MU == PER_ROW:
            mu = tl.load(mu_ptr + row)
        else:
            mu = mu_number
        shift = shift_outside(mu, penalty, DROP)

        r = pre_topelta(total, centre, KL_DIRECTION)

        count = 0
        outside = 0.0
        mean = 0.0
        squares = 0.0
        weighted = 0.0
        steered_max = NEG_INF + 0.0
        steered_total = 0.0
        for i in range(TILES):
            tile = split * TILES + i
            if tl.load(fields + MAX * width + tile) >= threshold:
                token = tile * TILE + tl.arange(0, TILE)
                inside = token < vocabulary
                z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
                a = tl.load(pre_row + token, mask=inside, other=NEG_INF).to(tl.float32)
                keep = (z >= threshold) & inside
                u, p, delta = steering(z, a, maximum, total, pre_top, centre, KL_DIRECTION)
                if SUMS:
                    x = tl.where(keep, delta - r, 0.0)
                    count += tl.sum(keep.to(tl.int32), 0)
                    outside += tl.sum(tl.where(keep, 0.0, p), 0)
                    mean += tl.sum(p * x, 0)
                    squares += tl.sum(tl.where(keep, delta * delta, 0.0), 0)
                    weighted += tl.sum(p * x * x, 0)
                if STEER:
                    zs = steered(u, delta, keep, mu, shift)
                    tile_max = tl.max(zs, 0)
                    tile_total = tl.sum(tl.exp(zs - finite_or_zero(tile_max)), 0)
                    steered_max, steered_total = add_totals(steered_max, steered_total, tile_max, tile_total)
        if SUMS:
            tl.store(own_fields + COUNT * num_splits, count.to(tl.float32))
            tl.store(own_fields + OUTSIDE * num_splits, outside)
            tl.store(own_fields + MEAN * num_splits, mean)
            tl.store(own_fields + SQUARES * num_splits, squares)
            tl.store(own_fields + WEIGHTED_SQUARES * num_splits, weighted)
        if STEER:
            tl.store(own_fields + STEERED_MAX * num_splits, steered_max)
            tl.store(own_fields + STEERED_TOTAL * num_splits, steered_total)
            tl.store(own_fields + ROW_TOTAL * num_splits, tl.where(valid, total, float("nan")))
            tl.store(own_fields + ROW_PRE_TOP * num_splits, pre_top)
            tl.store(own_fields + ROW_CENTRE * num_splits, centre)
    elif FILL:
        out_row = out_ptr + row_start(row, size1, size2, out_stride0, out_stride1, out_stride2)
        for i in range(TILES):
            token = (split * TILES + i) * TILE + tl.arange(0, TILE)
            tl.store(out_row + token, tl.full([TILE], NEG_INF, tl.float32), mask=token < vocabulary)


@triton.jit
def steered_output_kernel(
    pre_ptr,
    ft_ptr,
    tiles_ptr,
    split_max_ptr,
    kept_ptr,
    mu_ptr,
    label_ptr,
    out_ptr,
    mu_out_ptr,
    count_out_ptr,
    kl_out_ptr,
    mu_star_out_ptr,
    moments_out_ptr,
    mu_number,
    log_alpha,
    penalty,
    eps,
    vocabulary,
    num_splits,
    size1,
    size2,
    pre_stride0,
    pre_stride1,
    pre_stride2,
    ft_stride0,
    ft_stride1,
    ft_stride2,
    out_stride0,
    out_stride1,
    out_stride2,
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
    program = tl.program_id(0)
    if DENSE:
        row = program // num_splits
        split = program % num_splits
    else:
        row = program
        split = 0
    row64 = row.to(tl.int64)
    split_max = load_field(split_max_ptr + row64 * num_splits, 0, num_splits, NEG_INF, SPLITS)
    maximum = tl.max(split_max, 0)
    threshold = maximum + log_alpha
    kept = split_max >= threshold
    own_kept = tl.load(split_max_ptr + row64 * num_splits + split) >= threshold
    width = num_splits * TILES
    fields = tiles_ptr + row64 * (TILE_FIELDS * width)
    kept_fields = kept_ptr + row64 * (KEPT_FIELDS * num_splits)
    pre_row = pre_ptr + row_start(row, size1, size2, pre_stride0, pre_stride1, pre_stride2)
    ft_row = ft_ptr + row_start(row, size1, size2, ft_stride0, ft_stride1, ft_stride2)
    out_row = out_ptr
    if DENSE:
        out_row = out_ptr + row_start(row, size1, size2, out_stride0, out_stride1, out_stride2)

    total = float("nan")
    pre_top = 0.0
    centre = 0.0
    mu = mu_number
    if MU == PER_ROW:
        mu = tl.load(mu_ptr + row)
    whole_row = split == 0  # one program a row merges everything and stores the scalars
    if (not DROP) or (MU == OWN) or whole_row:
        total, pre_top, centre, valid = merge_row(fields, width, SPLITS * TILES)
        label = IGNORE + 0
        if LABELS:
            label = tl.load(label_ptr + row)
            n, d, h = label_moments(
                kept_fields, kept, fields, num_splits, pre_row, ft_row, label, maximum, threshold, total, pre_top,
                centre, vocabulary, KL_DIRECTION, SPLITS, TILES,
            )  # fmt: skip
            mu_star = optimal_mu(n, d, label, eps)
            if MU == OWN:
                mu = mu_star
        if whole_row:
            nan_unless_valid = tl.where(valid, 0.0, float("nan"))
            count = kept_field(kept_fields, COUNT, kept, num_splits, SPLITS)
            tl.store(count_out_ptr + row, tl.where(valid, count, 0.0).to(tl.int32))
            tl.store(mu_out_ptr + row, mu + nan_unless_valid)
            if WITH_KL:
                kl = row_kl(fields, width, total, pre_top, centre, SPLITS * TILES)
                tl.store(kl_out_ptr + row, kl + nan_unless_valid)
            if LABELS:
                tl.store(mu_star_out_ptr + row, mu_star + nan_unless_valid)
                tl.store(moments_out_ptr + row64 * 3, n + nan_unless_valid)
                tl.store(moments_out_ptr + row64 * 3 + 1, d + nan_unless_valid)
                tl.store(moments_out_ptr + row64 * 3 + 2, h + nan_unless_valid)
        total = tl.where(valid, total, float("nan"))
    elif own_kept:
        total = tl.load(kept_fields + ROW_TOTAL * num_splits + split)
        pre_top = tl.load(kept_fields + ROW_PRE_TOP * num_splits + split)
        centre = tl.load(kept_fields + ROW_CENTRE * num_splits + split)

    if DENSE:
        is_nan_row = total != total
        if DROP and is_nan_row:
            # Splits without a kept token hold -inf already, so the row's first program alone overwrites all of it.
            if whole_row:
                for i in range(num_splits * TILES):
                    token = i * TILE + tl.arange(0, TILE)
                    tl.store(out_row + token, tl.full([TILE], float("nan"), tl.float32), mask=token < vocabulary)
        elif (not DROP) or own_kept:
            steered_max = tl.where(kept, load_field(kept_fields, STEERED_MAX, num_splits, NEG_INF, SPLITS), NEG_INF)
            steered_total = tl.where(kept, load_field(kept_fields, STEERED_TOTAL, num_splits, 0.0, SPLITS), 0.0)
            top, mass = merge_totals(steered_max, steered_total)
            shift = shift_outside(mu, penalty, DROP)
            if not DROP:
                # Tiles without a kept token enter as they are: no difference of masses, nothing cancels.
                tile_max = load_field(fields, MAX, width, NEG_INF, SPLITS * TILES)
                tile_total = load_field(fields, TOTAL, width, 0.0, SPLITS * TILES)
                outside_max, outside_total = merge_totals(
                    tl.where(tile_max >= threshold, NEG_INF, tile_max - maximum + shift), tile_total
                )
                top, mass = add_totals(top, mass, outside_max, outside_total)
            normaliser = log_total(top, mass) + (total - total)  # NaN for a row that is not valid
            for i in range(TILES):
                tile = split * TILES + i
                token = tile * TILE + tl.arange(0, TILE)
                inside = token < vocabulary
                has_kept = tl.load(fields + MAX * width + tile) >= threshold
                if has_kept:
                    z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
                    a = tl.load(pre_row + token, mask=inside, other=NEG_INF).to(tl.float32)
                    u, _, delta = steering(z, a, maximum, total, pre_top, centre, KL_DIRECTION)
                    zs = steered(u, delta, z >= threshold, mu, shift)
                    tl.store(out_row + token, zs - normaliser, mask=inside)
                elif DROP:
                    tl.store(out_row + token, tl.full([TILE], NEG_INF, tl.float32), mask=inside)
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
    dense: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(logprobs, mu, num_kept, kl, mu_star, moments); arguments are checked by `svdecode.ops`. dense=False: no logprobs."""
    shape, vocabulary = logits_ft.shape[:-1], logits_ft.shape[-1]

    def new(*trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((*shape, *trailing), dtype=dtype, device=logits_ft.device)

    logprobs = out if out is not None else (new(vocabulary) if dense else None)
    (pre, ft, *written), layout = row_layout(logits_pre, logits_ft, *([logprobs] if dense else []))
    used, num_kept = new(), new(dtype=torch.int32)
    kl = new() if return_kl else None
    mu_star, moments = (new(), new(3)) if labels is not None else (None, None)
    results = (logprobs, used, num_kept, kl, mu_star, moments)
    rows = used.numel()
    if rows == 0:
        return results
    source, number, per_row = strength_source(mu, shape)
    num_splits = splits(vocabulary)
    with on_device_of(ft):
        statistics = row_statistics(pre, ft, layout, return_kl)
        kept = torch.empty((rows, KEPT_FIELDS.value, num_splits), dtype=torch.float32, device=ft.device)
        labels = None if labels is None else labels.reshape(-1).contiguous()
        numbers = (number, math.log(alpha) if alpha > 0 else -math.inf, penalty, eps, vocabulary, num_splits)
        strides = layout.arguments if dense else (*layout.arguments, 0, 0, 0)
        target = written[0] if dense else None
        shared = dict(
            KL_DIRECTION=direction == KL,
            DROP=penalty == -math.inf,
            MU=source,
            TILES=TILES,
            TILE=TILE,
            SPLITS=next_power_of_2(num_splits),
            num_warps=NUM_WARPS,
        )
        inputs = (pre, ft, *statistics, kept, per_row, labels)
        for sums, steer in ((True, False), (False, dense)) if source == OWN.value else ((True, dense),):
            if sums or steer:
                kept_sums_kernel[(rows * num_splits,)](
                    *(*inputs, target, *numbers, *strides),
                    SUMS=sums,
                    STEER=steer,
                    FILL=steer and penalty == -math.inf,
                    **shared,
                )
        steered_output_kernel[(rows * num_splits if dense else rows,)](
            *(*inputs, target, used, num_kept, kl, mu_star, moments, *numbers, *strides),
            LABELS=labels is not None,
            WITH_KL=return_kl,
            DENSE=dense,
            **shared,
        )
    if dense and target is not logprobs:  # an `out` that only a copy could be laid out with
        logprobs.copy_(target)
    return results


def strength_source(mu: Tensor | None, shape: torch.Size) -> tuple[int, float, Tensor | None]:
    """(source, number, per-row tensor): a 0-dim CPU tensor is a number, so that reading it never waits for a GPU."""
    if mu is None:
        return OWN.value, 0.0, None
    if mu.dim() == 0 and mu.device.type == "cpu":
        return NUMBER.value, mu.item(), None
    return PER_ROW.value, 0.0, mu.float().expand(shape).reshape(-1).contiguous()


_BLOCKS = {"TILES": (TILES,), "TILE": (TILE,), "SPLITS": (32,)}
KERNEL_VARIANTS = [
    (
        kept_sums_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (0, 1), "SUMS": (True,), "STEER": (True,), "FILL": (True,)}
        | _BLOCKS,
    ),
    (
        kept_sums_kernel,
        {"KL_DIRECTION": (False,), "DROP": (True,), "MU": (2,), "SUMS": (False,), "STEER": (True,), "FILL": (True,)} | _BLOCKS,
    ),
    (
        steered_output_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "MU": (0, 2), "LABELS": (True,), "WITH_KL": (True,)}
        | {"DENSE": (True, False)}
        | _BLOCKS,
    ),
]
