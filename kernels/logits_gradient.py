"""The gradients of a row's tokens, dL/dlogits_pre and dL/dlogits_ft: one launch that sums over K, one that writes."""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode.kernels.gradient_sums import (
    COEF_KL,
    GRAD_C_SUM,
    PW_SUM,
    open_saved_row,
    tile_sum,
)
from svdecode.kernels.row_algebra import (
    INF,
    NEG_INF,
    difference_from_top,
    exponential,
)
from svdecode.kernels.row_layout import logit_rows, within
from svdecode.kernels.row_statistics import (
    MAX,
    load_label,
    next_tile,
    of_group,
    tokens_of_split,
    workspace_of,
)
from svdecode.kernels.saved_row import saved_row
from svdecode.kernels.settings import UNSPECIALISED
from svdecode.kernels.token_gradients import NLL, VECTOR, gradient_row, token_gradients
from svdecode.kernels.variants import COMPILED_ROW, COMPILED_SPLIT, Variant


@triton.jit(do_not_specialize=(*UNSPECIALISED, "num_strengths"))
def delta_gradient_sums_kernel(
    pre_ptr,
    ft_ptr,
    grad_ptr,
    saved_ptr,
    workspace_ptr,
    mu_ptr,
    label_ptr,
    nll_ptr,
    log_alpha,
    penalty,
    num_strengths,
    vocabulary,
    num_tiles,
    group_size,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MODE: tl.constexpr,
    DENSE: tl.constexpr,
    LABELS: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the sums of dL/dc and of p w over each of a group's tiles with kept tokens; both are 0 outside K."""
    row_index = tl.program_id(0)
    group = tl.program_id(1)
    row, _total, threshold, normaliser, mean = saved_row(saved_ptr, row_index, log_alpha)
    record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    _used, kept = open_saved_row(fields, num_tiles, threshold, WIDTH)
    own = of_group(kept, group, group_size, WIDTH)
    tile = next_tile(own, 0, WIDTH)
    if tile < WIDTH:
        pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
        grad_row = gradient_row(
            grad_ptr, record, row_index, layout[0], layout[3], zero, num_strengths, MODE, DENSE, ALIGN
        )
        label_z = NEG_INF + 0.0
        label_a = NEG_INF + 0.0
        if MODE == NLL:
            _in_range, label_z, label_a = load_label(pre_row, ft_row, tl.load(label_ptr + row_index), vocabulary)
        pointers = (pre_row, ft_row, grad_row, record)
        given = (mu_ptr, label_ptr, nll_ptr, label_z, label_a)
        while tile < WIDTH:
            _token, _inside, _z, _a, p, _c, _h, grad_c, w = token_gradients(
                tile, pointers, given, row_index, row, threshold, normaliser, mean, num_strengths, vocabulary, penalty,
                KL_DIRECTION, DROP, MODE, DENSE, LABELS, ALIGN, TILE,
            )  # fmt: skip
            tl.store(fields + GRAD_C_SUM * WIDTH + tile, tl.sum(grad_c, 0))
            tl.store(fields + PW_SUM * WIDTH + tile, tl.sum(p * w, 0))
            tile = next_tile(own, tile + 1, WIDTH)


@triton.jit(do_not_specialize=(*UNSPECIALISED, "num_strengths"))
def logits_gradient_kernel(
    pre_ptr,
    ft_ptr,
    grad_ptr,
    saved_ptr,
    workspace_ptr,
    mu_ptr,
    label_ptr,
    nll_ptr,
    kl_ptr,
    pre_grad_out_ptr,
    ft_grad_out_ptr,
    log_alpha,
    penalty,
    num_strengths,
    vocabulary,
    num_tiles,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    MODE: tl.constexpr,
    DENSE: tl.constexpr,
    LABELS: tl.constexpr,
    GRAD_KL: tl.constexpr,
    NEED_PRE: tl.constexpr,
    NEED_FT: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write dL/dlogits_pre and dL/dlogits_ft of one split; zeros in a row that is not valid.

    Where h is 0 outside K, a split without a kept token takes a short way: its tokens share s, <p, q> and dL/dKL alone.
    """
    row_index = tl.program_id(0)
    split = tl.program_id(1)
    row, total, threshold, normaliser, mean = saved_row(saved_ptr, row_index, log_alpha)
    maximum, inverse, pre_top, centre = row
    record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
    row_offset = tl.multiple_of(row_index.to(tl.int64) * vocabulary, ALIGN)
    SHORT: tl.constexpr = DROP or MODE == VECTOR or not (DENSE or MODE == NLL)
    own_maxima = tl.load(fields + MAX * WIDTH + split * TILES + tl.arange(0, TILES))
    _used, kept = open_saved_row(fields, num_tiles, threshold, WIDTH)
    s = -tile_sum(fields, GRAD_C_SUM, kept, WIDTH)
    pq = tile_sum(fields, PW_SUM, kept, WIDTH)  # <p, d - dbar> = 0: s adds nothing
    grad_kl = 0.0
    log_pre_total = 0.0
    if GRAD_KL:
        grad_kl = tl.load(record + COEF_KL)
        log_pre_total = tl.load(kl_ptr + row_index) - centre + tl.log(total)  # lse(a) - pre_top

    tokens_differ = True
    if SHORT:
        tokens_differ = tl.max(own_maxima, 0) >= threshold
        if not tokens_differ:
            block = tokens_of_split(split, LANES, TILES, TILE)
            within_row = within(block, vocabulary, ALIGN)
            block_z = tl.load(ft_row + block, mask=within_row, other=0.0).to(tl.float32)
            block_a = tl.load(pre_row + block, mask=within_row, other=0.0).to(tl.float32)
            block_u = block_z - maximum
            block_p = exponential(block_u) * inverse
            block_c = block_u - (block_a - pre_top) - centre
            shared = s * block_p
            block_grad_z = shared + block_p * ((s + grad_kl) * block_c - pq)
            block_grad_a = -shared
            if GRAD_KL:
                block_grad_a += grad_kl * (exponential(block_a - (pre_top + log_pre_total)) - block_p)
            # Excluded tokens, NaN and rows that are not valid make a gradient not finite: the long way takes care of them.
            finite = tl.sum(tl.sum(tl.abs(block_grad_z) + tl.abs(block_grad_a), 0), 0) < INF
            if finite:
                if NEED_FT:
                    tl.store(ft_grad_out_ptr + row_offset + block, block_grad_z, mask=within_row)
                if NEED_PRE:
                    tl.store(pre_grad_out_ptr + row_offset + block, block_grad_a, mask=within_row)
            tokens_differ = not finite
    if tokens_differ:
        grad_row = gradient_row(
            grad_ptr, record, row_index, layout[0], layout[3], zero, num_strengths, MODE, DENSE, ALIGN
        )
        label_z = NEG_INF + 0.0
        label_a = NEG_INF + 0.0
        if MODE == NLL:
            _in_range, label_z, label_a = load_label(pre_row, ft_row, tl.load(label_ptr + row_index), vocabulary)
        pointers = (pre_row, ft_row, grad_row, record)
        given = (mu_ptr, label_ptr, nll_ptr, label_z, label_a)
        for i in range(TILES):
            token, inside, z, a, p, c, h, grad_c, w = token_gradients(
                split * TILES + i, pointers, given, row_index, row, threshold, normaliser, mean, num_strengths, vocabulary,
                penalty, KL_DIRECTION, DROP, MODE, DENSE, LABELS, ALIGN, TILE,
            )  # fmt: skip
            grad_d = tl.where((a > NEG_INF) & (z > NEG_INF), grad_c + s * p, 0.0)
            if NEED_FT:
                d = difference_from_top(z, a, maximum, pre_top) - centre
                grad_z = h + grad_d + tl.where(z > NEG_INF, p * (w + s * d - pq), 0.0)
                if GRAD_KL:
                    grad_z += tl.where(grad_kl != 0, grad_kl * p * c, 0.0)
                tl.store(ft_grad_out_ptr + row_offset + token, tl.where(total > 0, grad_z, 0.0), mask=inside)
            if NEED_PRE:
                grad_a = -grad_d
                if GRAD_KL:
                    pre_p = exponential(a - pre_top - log_pre_total)
                    grad_a += tl.where(grad_kl != 0, grad_kl * (pre_p - p), 0.0)
                tl.store(pre_grad_out_ptr + row_offset + token, tl.where(total > 0, grad_a, 0.0), mask=inside)


_MODES = [
    {"KL_DIRECTION": (True,), "DROP": (True, False), "MODE": (0,), "DENSE": (True,), "LABELS": (True,)},
    {"KL_DIRECTION": (True,), "DROP": (False,), "MODE": (1,), "DENSE": (False,), "LABELS": (False,)},
    {"KL_DIRECTION": (False,), "DROP": (True,), "MODE": (2,), "DENSE": (True,), "LABELS": (False,)},
]
_ALL = {"GRAD_KL": (True,), "NEED_PRE": (True,), "NEED_FT": (True,)}
KERNEL_VARIANTS = [
    *(Variant(delta_gradient_sums_kernel, mode | COMPILED_ROW, tensors=3) for mode in _MODES),
    *(Variant(logits_gradient_kernel, mode | _ALL | COMPILED_SPLIT, tensors=3) for mode in _MODES),
]
