"""The arithmetic of one vocabulary row, shared by every kernel.

Statistics of a piece of a row, where the top token is the one with the largest z (and the largest a where tokens tie):

    max, total             max z, sum e^(z - max)
    pre_top, weighted      a of the top token, sum e^(z - max) (d - d_top), where d - d_top = (z - max) - (a - pre_top)
    pre_max, pre_total     max a, sum e^(a - pre_max), +inf where some token has a = -inf < z: the KL is infinite
                           (pre_total only where the KL is asked for)

They are associative: merging rescales to a common maximum and a common top token. NaN and +inf anywhere make `total` or
`weighted` NaN or infinite and stay so through every merge, so that `is_valid` finds them on the merged row. exp(-inf - -inf)
never happens: a maximum of -inf is replaced by 0 before subtracting.

All logits are taken relative to the top token's, which keeps fp32 accurate where a language model is sure of itself, most of
the time: c of the top token is then a sum of small numbers, not the difference of large ones. A token that the pre-trained
model excludes has d = 0; if that is the top token, its a is taken to be its z.

A row, for the functions below, is the tuple (maximum, inverse, pre_top, centre): max z, 1 / total, and centre = <p, d> - d_top.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def finite_or_zero(x):
    """x with -inf replaced by 0, to subtract or to multiply safely; NaN and +inf stay."""
    return tl.where(x == NEG_INF, 0.0, x)


@triton.jit
def exponential(x):
    """e^x, 0 below 2^-126: `tl.exp` keeps numbers below that, at six more instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def difference_from_top(z, a, maximum, pre_top):
    """d - d_top, where d is 0 for tokens that the pre-trained model excludes.

    A token with z = -inf gives any finite number (p = 0 follows), but NaN or +inf in its a still shows.
    """
    d = finite_or_zero(z - maximum) - (a - pre_top)
    return tl.where(a == NEG_INF, pre_top - maximum, d)


@triton.jit
def scale_to(maximum, common):
    """e^(maximum - common), 0 for an empty piece."""
    return tl.where(maximum == NEG_INF, 0.0, exponential(maximum - finite_or_zero(common)))


@triton.jit
def merge_totals(maxima, totals):
    """(max, total) of a vector of pieces."""
    common = tl.max(maxima, 0)
    return common, tl.sum(totals * scale_to(maxima, common), 0)


@triton.jit
def add_totals(max1, total1, max2, total2):
    """(max, total) of two pieces."""
    common = tl.maximum(max1, max2)
    return common, total1 * scale_to(max1, common) + total2 * scale_to(max2, common)


@triton.jit
def is_valid(total, centre, pre_max):
    """Whether a whole row has no NaN, no +inf, and a finite entry in both models. Comparisons with NaN are false."""
    return (total > 0) & (total < INF) & (tl.abs(centre) < INF) & (pre_max > NEG_INF)


@triton.jit
def steering(z, a, row, KL_DIRECTION: tl.constexpr):
    """(u, p, c, delta) of tokens of a row.

    u = z - max, p = e^u / total, c = (d - d_top) - centre, 0 for tokens that either model excludes; delta = p * c or c.
    """
    maximum, inverse, pre_top, centre = row
    u = z - maximum
    p = exponential(u) * inverse
    c = tl.where((z == NEG_INF) | (a == NEG_INF), 0.0, u - (a - pre_top) - centre)
    if KL_DIRECTION:
        delta = p * c
    else:
        delta = c
    return u, p, c, delta


@triton.jit
def top_delta(row, KL_DIRECTION: tl.constexpr):
    """delta of the row's top token, where p = 1 / total and c = -centre; for one that neither model excludes."""
    _maximum, inverse, _pre_top, centre = row
    if KL_DIRECTION:
        delta = inverse * -centre
    else:
        delta = -centre
    return delta


@triton.jit
def steered(u, delta, keep, mu, shift):
    """zs relative to the row's maximum: u + mu delta on K, u + shift elsewhere; shift = |mu| * penalty, or -inf."""
    return tl.where(keep, u + mu * delta, u + shift)


@triton.jit
def shift_outside(mu, penalty, DROP: tl.constexpr):
    """|mu| * penalty, and -inf where the penalty is -inf, whatever mu is."""
    if DROP:
        shift = mu * 0 + NEG_INF
    else:
        shift = tl.abs(mu) * penalty
    return shift
