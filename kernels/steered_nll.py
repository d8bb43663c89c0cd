"""steered_nll: the NLL of the labels under M strengths at once, two launches, nothing of size (..., V).

1. `row_statistics_kernel`   reads both inputs once                                                     (rows, splits)
2. `steered_nll_kernel`      walks the tiles that hold kept tokens and keeps a running normaliser for each of STRENGTHS
                             strengths; all other tokens enter through their totals      (rows, blocks of strengths)
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.constants import KL, SAVED_FIELDS
from svdecode.kernels.arguments import log_threshold
from svdecode.kernels.kept_sums import IGNORE
from svdecode.kernels.launch import launch
from svdecode.kernels.merged_row import merge_row
from svdecode.kernels.row_algebra import (
    exponential,
    finite_or_zero,
    scale_to,
    shift_outside,
    steered,
    steering,
)
from svdecode.kernels.row_layout import RowLayout, logit_rows, on_device_of
from svdecode.kernels.row_statistics import (
    TOTAL,
    load_field,
    load_label,
    load_tile,
    next_tile,
    open_row,
    row_statistics,
    workspace_of,
)
from svdecode.kernels.saved_row import save_row
from svdecode.kernels.settings import STRENGTHS, UNSPECIALISED
from svdecode.kernels.variants import COMPILED_ROW, Variant


@triton.jit(do_not_specialize=(*UNSPECIALISED, "num_strengths"))
def steered_nll_kernel(
    pre_ptr,
    ft_ptr,
    workspace_ptr,
    label_ptr,
    mu_ptr,
    nll_out_ptr,
    saved_out_ptr,
    log_alpha,
    penalty,
    num_strengths,
    vocabulary,
    num_tiles,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    STRENGTHS: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the NLL of one row at STRENGTHS strengths; the first of a row's programs stores what the backward needs."""
    row_index = tl.program_id(0)
    block = tl.program_id(1)
    strength = block * STRENGTHS + tl.arange(0, STRENGTHS)
    exists = strength < num_strengths
    mu = tl.load(mu_ptr + strength, mask=exists, other=0.0)
    shift = shift_outside(mu, penalty, DROP)

    _record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    used, maxima, kept, threshold = open_row(fields, num_tiles, log_alpha, WIDTH)
    row, total, _kl, _top_excluded, valid = merge_row(fields, used, maxima, False, WIDTH)
    maximum, _inverse, _pre_top, _centre = row
    pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)

    top = tl.full([STRENGTHS], float("-inf"), tl.float32)
    mass = tl.zeros([STRENGTHS], tl.float32)
    if not DROP:
        totals = load_field(fields, TOTAL, used, 0.0, WIDTH)
        outside = tl.sum(tl.where(kept, 0.0, totals * scale_to(maxima, maximum)), 0)
        top = tl.where(outside > 0, shift, top)
        mass = mass + outside
    tile = next_tile(kept, 0, WIDTH)
    while tile < WIDTH:
        _token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, ALIGN, TILE)
        keep = (z >= threshold) & inside
        u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
        zs = steered(u[None, :], delta[None, :], keep[None, :], mu[:, None], shift[:, None])
        common = tl.maximum(top, tl.max(zs, 1))
        mass = mass * scale_to(top, common) + tl.sum(exponential(zs - finite_or_zero(common)[:, None]), 1)
        top = common
        tile = next_tile(kept, tile + 1, WIDTH)

    label = tl.load(label_ptr + row_index)
    in_range, z, a = load_label(pre_row, ft_row, label, vocabulary)
    u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
    nll = top + tl.log(mass) - steered(u, delta, z >= threshold, mu, shift)
    nll = tl.where(in_range, nll, tl.where(label == IGNORE, 0.0, float("nan")))
    nll = tl.where(valid, nll, float("nan"))
    tl.store(nll_out_ptr + row_index.to(tl.int64) * num_strengths + strength, nll, mask=exists)
    if block == 0:  # each strength has its own normaliser: it comes again from the NLL
        save_row(saved_out_ptr, row_index, row, tl.where(valid, total, float("nan")), 0.0, 0.0)


def steered_nll(
    logits_pre: Tensor,
    logits_ft: Tensor,
    labels: Tensor,
    mu: Tensor,
    alpha: float,
    penalty: float,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """(nll (..., M), saved for the backward); arguments are checked by `svdecode.ops`."""
    layout = RowLayout(logits_pre, logits_ft)
    pre, ft = layout.tensors
    nll = torch.empty((*labels.shape, mu.shape[0]), dtype=torch.float32, device=ft.device)
    saved = torch.empty((*labels.shape, SAVED_FIELDS), dtype=torch.float32, device=ft.device)
    if labels.numel() == 0 or mu.numel() == 0:
        return nll, saved.zero_()
    with on_device_of(ft):
        space = row_statistics(layout, with_kl=False)
        launch(
            steered_nll_kernel,
            (space.rows, triton.cdiv(mu.shape[0], STRENGTHS), 1),
            (
                *(pre, ft, space.memory, labels.reshape(-1).contiguous(), mu.float().contiguous(), nll, saved),
                *(log_threshold(alpha), penalty, mu.shape[0], space.vocabulary, space.num_tiles, 0, layout.of(pre, ft)),
            ),
            {
                "KL_DIRECTION": direction == KL,
                "DROP": penalty == -math.inf,
                "STRENGTHS": STRENGTHS,
                **space.constants,
            },
        )
    return nll, saved


KERNEL_VARIANTS = [
    Variant(
        steered_nll_kernel,
        {"KL_DIRECTION": (True,), "DROP": (True, False), "STRENGTHS": (STRENGTHS,)} | COMPILED_ROW,
        tensors=2,
    )
]
