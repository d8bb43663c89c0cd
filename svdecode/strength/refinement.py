"""Which strengths to look at next, so that minimum, intervals, halves and estimates rest on points beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from svdecode.strength.bootstrap import halves, minima_draws
from svdecode.strength.estimators import ESTIMATORS
from svdecode.strength.family import Family
from svdecode.strength.nll_curve import NLLCurve, with_both_zeros
from svdecode.strength.token_statistics import GoldTokens, TokenStatistics

CLOSE = 1e-4
"""The strength is exact when its error is estimated at less than this, relative to it where it is above 1."""

_LEVELS = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
_BESIDE = (0.95, 1.0, 1.05)
_APART = 1e-9


def is_close(curve: NLLCurve) -> bool:
    """Whether the minimum is exact."""
    return curve.error() <= CLOSE * max(1.0, abs(curve.minima().nan_to_num().item()))


def strengths_to_add(curve: NLLCurve, gold: GoldTokens | None, seed: int = 0) -> Tensor:
    """(N,) float64, rising, within the grid and not on it: where the curve should be known too."""
    found = [curve.minima() * torch.tensor(_BESIDE, dtype=torch.float64)]
    if len(curve) > 1:
        draws = minima_draws(curve, seed)
        found.append(draws.nanquantile(torch.tensor(_LEVELS, dtype=torch.float64)))
        found += [curve.select(half).minima() for half in halves(len(curve), seed)]
    if gold is not None:
        tokens = TokenStatistics(gold, curve)
        found.append(torch.tensor([estimate(tokens) for estimate in ESTIMATORS.values()], dtype=torch.float64))
    wanted = torch.cat(found).nan_to_num(0.0, 0.0, 0.0).unique()
    inside = (wanted > curve.mus[0]) & (wanted < curve.mus[-1])
    wanted = wanted[inside]
    return wanted[wanted[:, None].sub(curve.mus).abs().amin(1) > _APART * (1 + wanted.abs())]


def full_grid(family: Family, added: Tensor) -> Tensor:
    """Strengths for a reading of all data, where a part of them asked for `added`: those, 0, the ends, and what is beside."""
    coarse = family.coarse()
    if not len(added):
        return coarse
    below, above = coarse[coarse < added[0]], coarse[coarse > added[-1]]
    kept = torch.cat([below[:1], below[-2:], above[:2], above[-1:]])
    return with_both_zeros(torch.cat([kept, added]))
