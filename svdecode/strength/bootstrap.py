"""How sure calibration is: 95% bootstrap intervals that resample whole sequences, since tokens of one answer go together.

Resampling is reweighting: a draw gives each sequence a count. Sums need one matrix product, `median` and `trimmed` one sort of
the tokens. For `exact`, a draw's curve is the weighted sum of the sequences' curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from svdecode.common.intervals import RESAMPLES, resamples
from svdecode.strength.estimators import ESTIMATORS, TRIM
from svdecode.strength.nll_curve import NLLCurve
from svdecode.strength.token_statistics import GoldTokens, TokenStatistics

Interval = tuple[float, float]

_BLOCK = 2**20  # entries of a matrix (draws, tokens or sequences)


def bootstrap_estimates(tokens: TokenStatistics, seed: int = 0, number: int = RESAMPLES) -> dict[str, Tensor]:
    """(number,) float64 draws of every estimator in `ESTIMATORS`; NaN for `exact` in a draw without a scored token."""
    index, count = tokens.sequence_index(), len(tokens.curve)
    return {
        **_of_sums(tokens.gold, index, count, seed, number),
        **_of_order(tokens.gold, index, count, seed, number),
        "exact": minima_draws(tokens.curve, seed, number),
    }


def interval(draws: Tensor) -> Interval:
    """The 2.5% and the 97.5% point of (number,) draws, NaN left out."""
    low, high = draws.nanquantile(draws.new_tensor([0.025, 0.975])).tolist()
    return low, high


def ratio_draws(values: Tensor, weights: Tensor, seed: int = 0, number: int = RESAMPLES) -> Tensor:
    """(number,) float64 draws of sum(values) / sum(weights), both (S,), the S sequences resampled."""
    both = torch.stack([values, weights], 1).double()
    sums = torch.cat([drawn @ both for drawn in _counts(len(values), len(values), seed, number)])
    return sums[:, 0] / sums[:, 1]


def per_sequence(values: Tensor, index: Tensor, count: int) -> Tensor:
    """(count, ...) float64: sums of values (N, ...) over each sequence."""
    return torch.zeros(count, *values.shape[1:], dtype=torch.float64).index_add_(0, index, values.double())


def _counts(sequences: int, width: int, seed: int, number: int) -> Iterator[Tensor]:
    """Blocks (draws, sequences) float64 of how often each sequence is drawn; `width` is the widest matrix made of a block."""
    size = max(1, _BLOCK // max(width, 1))
    for start in range(0, number, size):
        draws = resamples(sequences, seed + start, min(size, number - start))
        ones = torch.ones(draws.shape, dtype=torch.float64)
        yield torch.zeros_like(ones).scatter_add_(1, draws, ones)


def _of_sums(tokens: GoldTokens, index: Tensor, count: int, seed: int, number: int) -> dict[str, Tensor]:
    ones = torch.ones(len(tokens), 1, dtype=tokens.mu_star.dtype)
    columns = torch.cat([ones, tokens.mu_star[:, None], tokens.moments], 1)
    sums = per_sequence(columns, index, count)
    drawn = torch.cat([counts @ sums for counts in _counts(count, count, seed, number)])
    tokens_drawn, strengths, n, d, h = drawn.unbind(1)
    quotients = {name: torch.where(below > 0, n / below, 0.0) for name, below in {"ratio": d, "newton": h}.items()}
    return {"mean": strengths / tokens_drawn, **quotients}


def _of_order(tokens: GoldTokens, index: Tensor, count: int, seed: int, number: int) -> dict[str, Tensor]:
    values, order = tokens.mu_star.double().sort()
    medians, trimmed = [], []
    for counts in _counts(count, len(tokens), seed, number):
        weights = counts[:, index[order]]
        upto = weights.cumsum(1)  # how many drawn tokens are at most this large
        sums = (weights * values).cumsum(1)
        size = upto[:, -1:]

        def sum_of_smallest(n: Tensor, upto: Tensor = upto, sums: Tensor = sums, weights: Tensor = weights) -> Tensor:
            at = torch.searchsorted(upto, n).clamp(max=len(values) - 1)
            before = sums.gather(1, at) - weights.gather(1, at) * values[at]
            return before + (n - upto.gather(1, at) + weights.gather(1, at)) * values[at]

        # The mean of the two in the middle; of an odd number they are the same one.
        middle = [torch.searchsorted(upto, torch.floor((size - shift) / 2), right=True) for shift in (1, 0)]
        medians.append((values[middle[0]] + values[middle[1]]).squeeze(1) / 2)
        cut = torch.floor(TRIM * size)
        inner = sum_of_smallest(size - cut) - sum_of_smallest(cut)
        trimmed.append((inner / (size - 2 * cut)).squeeze(1))
    return {"median": torch.cat(medians), "trimmed": torch.cat(trimmed)}


def minima_draws(curve: NLLCurve, seed: int = 0, number: int = RESAMPLES) -> Tensor:
    """(number,) float64 draws of `exact`, the sequences resampled; NaN in a draw without a scored token."""
    count = len(curve)
    return torch.cat([curve.minima(counts) for counts in _counts(count, count, seed, number)])


def gain(tokens: TokenStatistics, mu: float, seed: int = 0) -> dict[str, object]:
    """What a strength does for tokens: mean NLL of the scored gold tokens at 0 and at mu, their difference, its interval."""
    return _gain(tokens, tokens.curve.at(mu), seed)


def cross_fitted_gain(tokens: TokenStatistics, estimator: str, seed: int = 0) -> dict[str, object] | None:
    """As `gain`, each half of the sequences at the strength of the other half, so that no token is judged by its own strength.

    None where a half has no scored token.
    """
    if not all(bool(tokens.curve.scored[half].any()) for half in halves(len(tokens.curve), seed)):
        return None
    steered, strengths = crossed(tokens.curve, lambda fitted: ESTIMATORS[estimator](tokens.select(fitted)), seed)
    return {**_gain(tokens, steered, seed), "mus": strengths}


def crossed(curve: NLLCurve, strength: Callable[[Tensor], float], seed: int = 0) -> tuple[Tensor, list[float]]:
    """(S,) NLL of each sequence at the strength of the other half, and both strengths.

    Args:
        curve: of the sequences.
        strength: that of some sequences, (S,) bool.
        seed: of the halves.
    """
    found, strengths = torch.empty(len(curve), dtype=torch.float64), []
    for fitted in halves(len(curve), seed):
        strengths.append(strength(fitted))
        found[~fitted] = curve.select(~fitted).at(strengths[-1])
    return found, strengths


def halves(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(count,) bool each: a random half of the sequences, and the others."""
    first = torch.zeros(count, dtype=torch.bool)
    first[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 2]] = True
    return first, ~first


def _gain(tokens: TokenStatistics, steered: Tensor, seed: int) -> dict[str, object]:
    curve = tokens.curve
    plain, total = curve.at(0.0), curve.scored.sum()
    return {
        "nll_at_0": (plain.sum() / total).item(),
        "nll_at_mu": (steered.sum() / total).item(),
        **paired_gain(plain - steered, curve.scored, seed),
        "num_tokens": int(total),
        "num_sequences": int((curve.scored > 0).sum()),
        "coverage": tokens.coverage,
    }


def paired_gain(values: Tensor, scored: Tensor, seed: int = 0) -> dict[str, object]:
    """ "gain", sum(values) / sum(scored), both (S,), and its "interval"; None with fewer than two sequences that count."""
    there = scored > 0
    values, scored = values[there], scored[there]
    ends = list(interval(ratio_draws(values, scored, seed))) if len(values) > 1 else None
    return {"gain": (values.sum() / scored.sum()).item(), "interval": ends}


def curve_band(curve: NLLCurve, mus: list[float], seed: int = 0, number: int = 500) -> Tensor:
    """(2, M) float64: pointwise 95% band of NLL(mu) - NLL(0) of the scored gold tokens, NaN with a single sequence."""
    curve = curve.select(curve.scored > 0)
    count = len(curve)
    if count < 2:
        return torch.full((2, len(mus)), math.nan, dtype=torch.float64)
    plain = curve.at(0.0)
    sums = torch.stack([curve.scored.double(), *(curve.at(mu) - plain for mu in mus)], 1)
    drawn = torch.cat([counts @ sums for counts in _counts(count, count, seed, number)])
    return (drawn[:, 1:] / drawn[:, :1]).quantile(drawn.new_tensor([0.025, 0.975]), 0)
