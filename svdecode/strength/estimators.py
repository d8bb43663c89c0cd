"""The one strength used at decode time, estimated from calibration tokens (paper, appendix D; method, section 2)."""

from __future__ import annotations

from svdecode.strength.token_statistics import TokenStatistics

TRIM = 0.1
"""Share of the strengths that `trimmed` leaves out at each end."""


def mean(tokens: TokenStatistics) -> float:
    """Mean of the tokens' own strengths (Eq. 44: what the paper uses). Heavy-tailed."""
    return tokens.gold.mu_star.double().mean().item()


def median(tokens: TokenStatistics) -> float:
    """Median of the tokens' own strengths (Eq. 45); of an even number the mean of the two in the middle."""
    return tokens.gold.mu_star.double().quantile(0.5).item()


def trimmed(tokens: TokenStatistics) -> float:
    """Mean of the strengths without the TRIM smallest and the TRIM largest, that is around the median (Eq. 45)."""
    ordered = tokens.gold.mu_star.double().sort().values
    cut = int(TRIM * len(ordered))
    return ordered[cut : len(ordered) - cut].mean().item()


def ratio(tokens: TokenStatistics) -> float:
    """sum N / sum D (Eq. 47), the optimum of the Gauss-Newton model of the whole set."""
    return _quotient(tokens, 1)


def newton(tokens: TokenStatistics) -> float:
    """sum N / sum H, the Newton step with the exact curvature."""
    return _quotient(tokens, 2)


def _quotient(tokens: TokenStatistics, denominator: int) -> float:
    sums = tokens.gold.moments.double().sum(0)
    return (sums[0] / sums[denominator]).item() if sums[denominator] > 0 else 0.0


def exact(tokens: TokenStatistics) -> float:
    """argmin over mu of the mean NLL of the scored gold tokens under the steered distribution itself.

    Within [-MAX_STRENGTH, MAX_STRENGTH]; 0 where mu changes nothing. As exact as the curve's grid: `NLLCurve.error`.
    """
    return tokens.curve.minima().item()


ESTIMATORS = {
    "mean": mean,
    "median": median,
    "trimmed": trimmed,
    "ratio": ratio,
    "newton": newton,
    "exact": exact,
}
