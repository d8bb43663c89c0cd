"""The one strength used at decode time, estimated from calibration tokens (paper, appendix D; method, section 2)."""

from __future__ import annotations

import math

from svdecode.strength.token_statistics import TokenStatistics

TRIM = 0.1
"""Share of the strengths that `trimmed` leaves out at each end."""

MAX_STRENGTH = 1e3
"""Where `exact` stops: the objective may fall for ever when each gold token has the largest delta of its kept set."""

_ITERATIONS = 100
_TOLERANCE = 1e-9


def mean(tokens: TokenStatistics) -> float:
    """Mean of the tokens' own strengths (Eq. 44: what the paper uses). Heavy-tailed."""
    return tokens.mu_star.double().mean().item()


def median(tokens: TokenStatistics) -> float:
    """Median of the tokens' own strengths (Eq. 45); of an even number the mean of the two in the middle."""
    return tokens.mu_star.double().quantile(0.5).item()


def trimmed(tokens: TokenStatistics) -> float:
    """Mean of the strengths without the TRIM smallest and the TRIM largest, that is around the median (Eq. 45)."""
    ordered = tokens.mu_star.double().sort().values
    cut = int(TRIM * len(ordered))
    return ordered[cut : len(ordered) - cut].mean().item()


def ratio(tokens: TokenStatistics) -> float:
    """sum N / sum D (Eq. 47), the optimum of the Gauss-Newton model of the whole set."""
    return _quotient(tokens, 1)


def newton(tokens: TokenStatistics) -> float:
    """sum N / sum H, the Newton step with the exact curvature."""
    return _quotient(tokens, 2)


def _quotient(tokens: TokenStatistics, denominator: int) -> float:
    sums = tokens.moments.double().sum(0)
    return (sums[0] / sums[denominator]).item() if sums[denominator] > 0 else 0.0


def exact(tokens: TokenStatistics) -> float:
    """argmin over mu of the mean NLL of the covered gold tokens under the steered distribution itself.

    A bracketed Newton iteration on a convex function; within [-MAX_STRENGTH, MAX_STRENGTH]. 0 where mu changes nothing.
    """
    lowest, highest = (slopes.sum().item() for slopes in tokens.end_slopes())
    if lowest == 0 or highest == 0:
        # No minimum: flat, or falling for ever, which the slope itself no longer shows once it underflows.
        return MAX_STRENGTH * ((lowest != 0) - (highest != 0))
    direction = -math.copysign(1.0, tokens.derivatives(0.0)[1])
    step = 1.0
    while direction * tokens.derivatives(direction * step)[1] < 0:
        if step >= MAX_STRENGTH:
            return direction * MAX_STRENGTH
        step = min(2 * step, MAX_STRENGTH)
    low, high = sorted((0.0, direction * step))
    mu = 0.0
    for _ in range(_ITERATIONS):
        _, slope, curvature = tokens.derivatives(mu)
        low, high = (mu, high) if slope < 0 else (low, mu)
        candidate = mu - slope / curvature if curvature > 0 else math.nan
        following = candidate if low < candidate < high else (low + high) / 2
        if abs(following - mu) <= _TOLERANCE * max(1.0, abs(mu)):
            return following
        mu = following
    return mu


ESTIMATORS = {
    "mean": mean,
    "median": median,
    "trimmed": trimmed,
    "ratio": ratio,
    "newton": newton,
    "exact": exact,
}
