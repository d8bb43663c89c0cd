"""What the gradients of a row's tokens share: sums of the incoming gradient, dL/dmu, and dL/dN, dL/dD, dL/dH.

The forward of the row is not repeated: `saved_row` reads what it saved. Which tiles hold a kept token is found first, by a pass
over logits_ft; the launches after it read those tiles alone. See `backward.py` for the equations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode.kernels.row_algebra import NEG_INF, exponential, shift_outside, steered, steering
from svdecode.kernels.row_layout import logit_rows, row_pointer, within
from svdecode.kernels.row_statistics import (
    MAX,
    OWN_FIELDS,
    by_tile,
    load_field,
    load_label,
    load_tile,
    max_of_tile,
    next_tile,
    of_group,
    tokens_of_split,
    workspace_of,
)
from svdecode.kernels.saved_row import saved_row
from svdecode.kernels.settings import UNSPECIALISED
from svdecode.kernels.variants import COMPILED_ROW, COMPILED_SPLIT, Variant

# Fields of a tile in the workspace, and the record of a row.
G_SUM, G_DELTA, PS_DELTA, G_OUTSIDE, PS_OUTSIDE, GRAD_C_SUM, PW_SUM = (tl.constexpr(OWN_FIELDS + i) for i in range(7))
COEF_G, COEF_N, COEF_D, COEF_H, COEF_KL = (tl.constexpr(i) for i in range(5))


@triton.jit(do_not_specialize=UNSPECIALISED)
def tile_maxima_kernel(
    ft_ptr,
    workspace_ptr,
    vocabulary,
    zero,
    layout,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the maxima of the tiles of one split."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    token = tokens_of_split(split, LANES, TILES, TILE)
    sizes, ft_strides = layout
    ft_row = row_pointer(ft_ptr, row, sizes, ft_strides, zero, ALIGN)
    z = tl.load(ft_row + token, mask=within(token, vocabulary, ALIGN), other=NEG_INF)
    z = by_tile(z, LANES, TILES, TILE).to(tl.float32)
    _record, fields = workspace_of(workspace_ptr, row, WIDTH)
    tl.store(fields + MAX * WIDTH + split * TILES + tl.arange(0, TILES), max_of_tile(z))


@triton.jit
def open_saved_row(fields, num_tiles, threshold, WIDTH: tl.constexpr):
    """(used, kept): the tiles in use, those with a kept token."""
    used = tl.arange(0, WIDTH) < num_tiles
    return used, used & (load_field(fields, MAX, used, NEG_INF, WIDTH) >= threshold)


@triton.jit(do_not_specialize=UNSPECIALISED)
def steer_gradient_sums_kernel(
    pre_ptr,
    ft_ptr,
    grad_ptr,
    saved_ptr,
    mu_ptr,
    workspace_ptr,
    log_alpha,
    penalty,
    vocabulary,
    num_tiles,
    group_size,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store, per tile of a group, sums of g = dL/dlogprobs: all of it, g delta and softmax(zs) delta on K, both outside K."""
    row_index = tl.program_id(0)
    group = tl.program_id(1)
    row, _total, threshold, normaliser, _mean = saved_row(saved_ptr, row_index, log_alpha)
    _record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    used, kept = open_saved_row(fields, num_tiles, threshold, WIDTH)
    wanted = of_group(kept if DROP else used, group, group_size, WIDTH)
    mu = tl.load(mu_ptr + row_index)
    shift = shift_outside(mu, penalty, DROP)
    pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
    grad_row = row_pointer(grad_ptr, row_index, layout[0], layout[3], zero, ALIGN)
    tile = next_tile(wanted, 0, WIDTH)
    while tile < WIDTH:
        token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, ALIGN, TILE)
        keep = (z >= threshold) & inside
        u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
        zs = steered(u, delta, keep, mu, shift)
        reachable = (zs > NEG_INF) & inside
        if DROP:  # few tokens: predicated loads of single elements
            g = tl.load(grad_row + token, mask=keep, other=0.0)
        else:
            g = tl.load(grad_row + token, mask=inside, other=0.0)
        g = tl.where(reachable, g, 0.0)
        ps = tl.where(reachable, exponential(zs - normaliser), 0.0)
        own = fields + tile
        tl.store(own + G_SUM * WIDTH, tl.sum(g, 0))
        tl.store(own + G_DELTA * WIDTH, tl.sum(tl.where(keep, g * delta, 0.0), 0))
        tl.store(own + PS_DELTA * WIDTH, tl.sum(tl.where(keep, ps * delta, 0.0), 0))
        if not DROP:
            tl.store(own + G_OUTSIDE * WIDTH, tl.sum(tl.where(keep, 0.0, g), 0))
            tl.store(own + PS_OUTSIDE * WIDTH, tl.sum(tl.where(keep, 0.0, ps), 0))
        tile = next_tile(wanted, tile + 1, WIDTH)


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def tile_sum(fields, FIELD: tl.constexpr, wanted, WIDTH: tl.constexpr):
    """Sum of a field over the tiles that have it, in their order."""
    return tl.sum(load_field(fields, FIELD, wanted, 0.0, WIDTH), 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def gradient_coefficients_kernel(
    workspace_ptr,
    saved_ptr,
    mu_ptr,
    label_ptr,
    moments_ptr,
    kl_ptr,
    grad_mu_ptr,
    grad_kl_ptr,
    grad_mu_star_ptr,
    grad_moments_ptr,
    grad_mu_out_ptr,
    log_alpha,
    penalty,
    eps,
    num_tiles,
    DROP: tl.constexpr,
    DENSE: tl.constexpr,
    OWN_STRENGTH: tl.constexpr,
    LABELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store what one row's gradients share: sum g, dL/dN, dL/dD, dL/dH, dL/dKL; and dL/dmu."""
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    _row, total, threshold, _normaliser, _mean = saved_row(saved_ptr, row, log_alpha)
    valid = total > 0
    record, fields = workspace_of(workspace_ptr, row, WIDTH)
    grad_mu = 0.0
    if grad_mu_ptr is not None:
        grad_mu = tl.load(grad_mu_ptr + row)
    g_sum = 0.0
    if DENSE:
        used, kept = open_saved_row(fields, num_tiles, threshold, WIDTH)
        wanted = kept if DROP else used
        g_sum = tile_sum(fields, G_SUM, wanted, WIDTH)
        grad_mu += tile_sum(fields, G_DELTA, wanted, WIDTH) - g_sum * tile_sum(fields, PS_DELTA, wanted, WIDTH)
        if not DROP:
            outside = tile_sum(fields, G_OUTSIDE, wanted, WIDTH) - g_sum * tile_sum(fields, PS_OUTSIDE, wanted, WIDTH)
            grad_mu += sign(tl.load(mu_ptr + row)) * penalty * outside
    grad_n = 0.0
    grad_d = 0.0
    grad_h = 0.0
    if LABELS:
        used = valid & (tl.load(label_ptr + row) >= 0)
        n = tl.load(moments_ptr + row64 * 3)
        d = tl.load(moments_ptr + row64 * 3 + 1)
        used = used & (n == n)
        grad_star = 0.0
        if grad_mu_star_ptr is not None:
            grad_star = tl.load(grad_mu_star_ptr + row)
        if OWN_STRENGTH:
            grad_star += grad_mu
            grad_mu = 0.0
        grad_n = grad_star / (d + eps)
        grad_d = -grad_star * n / ((d + eps) * (d + eps))
        if grad_moments_ptr is not None:
            grad_n += tl.load(grad_moments_ptr + row64 * 3)
            grad_d += tl.load(grad_moments_ptr + row64 * 3 + 1)
            grad_h += tl.load(grad_moments_ptr + row64 * 3 + 2)
        grad_n = tl.where(used, grad_n, 0.0)
        grad_d = tl.where(used, grad_d, 0.0)
        grad_h = tl.where(used, grad_h, 0.0)
    grad_kl = 0.0
    if grad_kl_ptr is not None:
        grad_kl = tl.where(tl.load(kl_ptr + row) < float("inf"), tl.load(grad_kl_ptr + row), 0.0)
    tl.store(record + COEF_G, g_sum)
    tl.store(record + COEF_N, grad_n)
    tl.store(record + COEF_D, grad_d)
    tl.store(record + COEF_H, grad_h)
    tl.store(record + COEF_KL, grad_kl)
    tl.store(grad_mu_out_ptr + row, tl.where(valid, grad_mu, 0.0))


@triton.jit
def nll_normaliser(nll, label_u, label_delta, label_kept, mu, shift):
    """(normaliser, reachable) of zs at one strength, from the NLL: lse(zs) = NLL + zs_label; an NLL of +inf is a constant."""
    label_zs = steered(label_u, label_delta, label_kept, mu, shift)
    reachable = label_zs > NEG_INF
    return nll + tl.where(reachable, label_zs, 0.0), reachable


@triton.jit(do_not_specialize=(*UNSPECIALISED, "num_strengths"))
def strength_gradient_kernel(
    pre_ptr,
    ft_ptr,
    grad_ptr,
    saved_ptr,
    mu_ptr,
    label_ptr,
    nll_ptr,
    workspace_ptr,
    grad_mu_out_ptr,
    log_alpha,
    penalty,
    num_strengths,
    vocabulary,
    num_tiles,
    zero,
    layout,
    KL_DIRECTION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store one row's part of dL/dmu_m: G_m (<softmax(zs), delta>_K - delta_y), and the slope of the penalty outside K."""
    row_index = tl.program_id(0)
    m = tl.program_id(1)
    own = row_index.to(tl.int64) * num_strengths + m
    row, total, threshold, _normaliser, _mean = saved_row(saved_ptr, row_index, log_alpha)
    _record, fields = workspace_of(workspace_ptr, row_index, WIDTH)
    _used, kept = open_saved_row(fields, num_tiles, threshold, WIDTH)
    mu = tl.load(mu_ptr + m)
    shift = shift_outside(mu, penalty, DROP)
    pre_row, ft_row = logit_rows(pre_ptr, ft_ptr, row_index, layout, zero, ALIGN)
    label = tl.load(label_ptr + row_index)
    in_range, label_z, label_a = load_label(pre_row, ft_row, label, vocabulary)
    label_kept = label_z >= threshold
    label_u, _label_p, _label_c, label_delta = steering(label_z, label_a, row, KL_DIRECTION)
    lse, reachable = nll_normaliser(tl.load(nll_ptr + own), label_u, label_delta, label_kept, mu, shift)
    inner = 0.0
    kept_mass = 0.0
    tile = next_tile(kept, 0, WIDTH)
    while tile < WIDTH:
        _token, inside, z, a = load_tile(pre_row, ft_row, tile, vocabulary, ALIGN, TILE)
        u, _p, _c, delta = steering(z, a, row, KL_DIRECTION)
        keep = (z >= threshold) & inside
        ps = tl.where(keep, exponential(steered(u, delta, keep, mu, shift) - lse), 0.0)
        inner += tl.sum(ps * delta, 0)
        kept_mass += tl.sum(ps, 0)
        tile = next_tile(kept, tile + 1, WIDTH)
    slope = inner - tl.where(label_kept, label_delta, 0.0)
    if not DROP:
        slope += sign(mu) * penalty * (1.0 - kept_mass - tl.where(label_kept, 0.0, 1.0))
    used = reachable & in_range & (total > 0)
    tl.store(grad_mu_out_ptr + own, tl.where(used, tl.load(grad_ptr + own) * slope, 0.0))


KERNEL_VARIANTS = [
    Variant(tile_maxima_kernel, COMPILED_SPLIT, tensors=1),
    Variant(steer_gradient_sums_kernel, {"KL_DIRECTION": (True,), "DROP": (True, False)} | COMPILED_ROW, tensors=3),
    Variant(
        gradient_coefficients_kernel,
        {
            "DROP": (False,),
            "DENSE": (True,),
            "OWN_STRENGTH": (True,),
            "LABELS": (True,),
            "WIDTH": COMPILED_ROW["WIDTH"],
        },
        tensors=0,
    ),
    Variant(strength_gradient_kernel, {"KL_DIRECTION": (True,), "DROP": (False,)} | COMPILED_ROW, tensors=2),
]
