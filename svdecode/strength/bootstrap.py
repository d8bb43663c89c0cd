"""How sure calibration is: 95% bootstrap intervals that resample whole sequences, since tokens of one answer go together.

Resampling is reweighting: a draw gives each sequence a count. Sums need one matrix product, `median` and `trimmed` one sort of
the tokens. For `exact`, the slope of each sequence's NLL is tabulated on a grid of strengths that is refined where the draws'
minima lie; a draw's slope is then the weighted sum of these, and its root comes from the cubic through slope and curvature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from svdecode.common.intervals import RESAMPLES, resamples
from svdecode.strength.estimators import ESTIMATORS, MAX_STRENGTH, TRIM
from svdecode.strength.token_statistics import TokenStatistics

Interval = tuple[float, float]

_BLOCK = 2**22  # entries of a matrix (draws, tokens or sequences)
_COARSE, _FINE, _ROUNDS = 25, 33, 2
_BISECTIONS = 50


def bootstrap_estimates(tokens: TokenStatistics, seed: int = 0, number: int = RESAMPLES) -> dict[str, Tensor]:
    """(number,) float64 draws of every estimator in `ESTIMATORS`; NaN for `exact` in a draw without a covered token."""
    index, count = sequence_index(tokens)
    return {
        **_of_sums(tokens, index, count, seed, number),
        **_of_order(tokens, index, count, seed, number),
        "exact": _of_minima(tokens, index, count, seed, number),
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


def sequence_index(tokens: TokenStatistics) -> tuple[Tensor, int]:
    """(N,) int64: each token's sequence, numbered without gaps, and the number of sequences."""
    if int(tokens.sequence.min()) < 0:
        raise ValueError("these token statistics do not know their sequences: calibrate again")
    names, index = tokens.sequence.unique(return_inverse=True)
    return index, len(names)


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


def _of_sums(tokens: TokenStatistics, index: Tensor, count: int, seed: int, number: int) -> dict[str, Tensor]:
    ones = torch.ones(len(tokens), 1, dtype=tokens.mu_star.dtype)
    columns = torch.cat([ones, tokens.mu_star[:, None], tokens.moments], 1)
    sums = per_sequence(columns, index, count)
    drawn = torch.cat([counts @ sums for counts in _counts(count, count, seed, number)])
    tokens_drawn, strengths, n, d, h = drawn.unbind(1)
    quotients = {name: torch.where(below > 0, n / below, 0.0) for name, below in {"ratio": d, "newton": h}.items()}
    return {"mean": strengths / tokens_drawn, **quotients}


def _of_order(tokens: TokenStatistics, index: Tensor, count: int, seed: int, number: int) -> dict[str, Tensor]:
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


def _of_minima(tokens: TokenStatistics, index: Tensor, count: int, seed: int, number: int) -> Tensor:
    covered = tokens.covered
    ends = per_sequence(torch.stack([covered[covered].double(), *tokens.end_slopes()], 1), index[covered], count)
    drawn = torch.cat([counts @ ends for counts in _counts(count, count, seed, number)])
    num_covered, lowest, highest = drawn.unbind(1)
    # A kept set of one token has no slope.
    able = covered & (tokens.counts() > 1)
    tokens, index = tokens.select(able), index[able]
    roots = torch.zeros(number, dtype=torch.float64)
    if len(tokens):
        roots = _refined_roots(tokens, index, count, seed, number)
    roots = torch.where(highest == 0, MAX_STRENGTH, torch.where(lowest == 0, -MAX_STRENGTH, roots))
    roots = torch.where((lowest == 0) & (highest == 0), 0.0, roots)
    return torch.where(num_covered == 0, math.nan, roots)


def _refined_roots(tokens: TokenStatistics, index: Tensor, count: int, seed: int, number: int) -> Tensor:
    half = torch.logspace(-1.5, math.log10(MAX_STRENGTH), _COARSE // 2, dtype=torch.float64)
    wanted = torch.cat([-half, half.new_zeros(1), half, half.new_tensor([ESTIMATORS["exact"](tokens)])])
    known: dict[float, Tensor] = {}
    for step in range(_ROUNDS + 1):
        for mu in wanted.tolist():
            if mu not in known:
                _, slope, curvature = tokens.per_token(mu)
                known[mu] = per_sequence(torch.stack([slope, curvature], 1), index, count)
        grid = torch.tensor(sorted(known), dtype=torch.float64)
        table = torch.stack([known[mu] for mu in grid.tolist()], 1).flatten(1)  # (sequences, grid * 2)
        roots = torch.cat([_roots(grid, counts @ table) for counts in _counts(count, count, seed, number)])
        if step < _ROUNDS:
            wanted = roots.quantile(torch.linspace(0, 1, _FINE, dtype=torch.float64))
    return roots


def _roots(grid: Tensor, drawn: Tensor) -> Tensor:
    """(R,) where each draw's slope, which rises, meets 0; `drawn` (R, grid * 2) holds slopes and curvatures."""
    slope, curvature = drawn.unflatten(1, (len(grid), 2)).unbind(2)
    below = (slope < 0).sum(1)
    left = (below - 1).clamp(0, len(grid) - 2)
    width = grid[left + 1] - grid[left]
    ends = [values.gather(1, at[:, None]).squeeze(1) for values in (slope, curvature) for at in (left, left + 1)]
    first, last, rise_first, rise_last = ends[0], ends[1], ends[2] * width, ends[3] * width
    low, high = torch.zeros_like(width), torch.ones_like(width)
    for _ in range(_BISECTIONS):
        t = (low + high) / 2
        s = 1 - t
        value = s * s * ((1 + 2 * t) * first + t * rise_first) + t * t * ((1 + 2 * s) * last - s * rise_last)
        low, high = torch.where(value < 0, t, low), torch.where(value < 0, high, t)
    roots = grid[left] + width * (low + high) / 2
    return torch.where(below == 0, grid[0], torch.where(below == len(grid), grid[-1], roots))


def gain(tokens: TokenStatistics, mu: float, seed: int = 0) -> dict[str, object]:
    """What a strength does for tokens: mean NLL of the covered gold tokens at 0 and at mu, their difference, its interval."""
    return _gain(tokens, tokens.nll(0.0), tokens.nll(mu), seed)


def cross_fitted_gain(tokens: TokenStatistics, estimator: str, seed: int = 0) -> dict[str, object] | None:
    """As `gain`, each half of the sequences at the strength of the other half, so that no token is judged by its own strength.

    None where a half has no covered token.
    """
    index, count = sequence_index(tokens)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 2]
    first = torch.zeros(count, dtype=torch.bool)
    first[chosen] = True
    first = first[index]
    steered = torch.full((len(tokens),), math.nan, dtype=torch.float64)
    strengths = []
    for fitted in (first, ~first):
        half = tokens.select(fitted)
        if not half.covered.any():
            return None
        strengths.append(ESTIMATORS[estimator](half))
        judged = ~fitted
        steered[judged & tokens.covered] = tokens.select(judged).nll(strengths[-1])
    return {**_gain(tokens, tokens.nll(0.0), steered[tokens.covered], seed), "mus": strengths}


def _gain(tokens: TokenStatistics, plain: Tensor, steered: Tensor, seed: int) -> dict[str, object]:
    index, count = sequence_index(tokens.select(tokens.covered))
    differences = per_sequence(plain - steered, index, count)
    sizes = per_sequence(torch.ones_like(plain), index, count)
    return {
        "nll_at_0": plain.mean().item(),
        "nll_at_mu": steered.mean().item(),
        "gain": (plain - steered).mean().item(),
        "interval": list(interval(ratio_draws(differences, sizes, seed))) if count > 1 else None,
        "num_tokens": len(plain),
        "num_sequences": count,
        "coverage": tokens.coverage,
    }


def curve_band(tokens: TokenStatistics, mus: list[float], seed: int = 0, number: int = 500) -> Tensor:
    """(2, M) float64: pointwise 95% band of NLL(mu) - NLL(0) of the covered gold tokens, NaN with a single sequence."""
    index, count = sequence_index(tokens.select(tokens.covered))
    if count < 2:
        return torch.full((2, len(mus)), math.nan, dtype=torch.float64)
    plain = tokens.nll(0.0)
    changes = torch.stack([torch.ones_like(plain), *(tokens.nll(mu) - plain for mu in mus)], 1)
    sums = per_sequence(changes, index, count)
    drawn = torch.cat([counts @ sums for counts in _counts(count, count, seed, number)])
    return (drawn[:, 1:] / drawn[:, :1]).quantile(drawn.new_tensor([0.025, 0.975]), 0)
