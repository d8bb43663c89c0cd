"""The one strength used at decode time, estimated from calibration tokens (paper, appendix D; method, section 2).

Per gold token only its kept set and a few scalars survive: 8 bytes a kept token and 40 a gold token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

TRIM = 0.1
"""Share of the strengths that `trimmed` leaves out at each end."""

MAX_STRENGTH = 1e3
"""Where `exact` stops: the objective may fall for ever when each gold token has the largest delta of its kept set."""

_ITERATIONS = 100
_TOLERANCE = 1e-9


@dataclass
class TokenStatistics:
    """What calibration keeps of N tokens, with T kept tokens in all of their kept sets together."""

    moments: Tensor  # (N, 3) float32: N, D, H
    mu_star: Tensor  # (N,) float32
    kl: Tensor  # (N,) float32, nats
    num_kept: Tensor  # (N,) int32
    logprobs: Tensor  # (T,) float32: log-probabilities within the kept set, token after token
    deltas: Tensor  # (T,) float32: the steering vector there
    gold: Tensor  # (N,) int64: index of the gold token in the (T,) tensors, -1 where it is not kept
    offsets: Tensor  # (N,) int64: index of each token's first kept token in the (T,) tensors

    @classmethod
    def concatenate(cls, parts: list[TokenStatistics]) -> TokenStatistics:
        """Join the statistics of several batches."""
        shift, moved = 0, []
        for part in parts:
            gold = torch.where(part.gold >= 0, part.gold + shift, -1)
            moved.append((gold, part.offsets + shift))
            shift += len(part.logprobs)
        names = [field.name for field in fields(cls) if field.name not in ("gold", "offsets")]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, gold=torch.cat([g for g, _ in moved]), offsets=torch.cat([o for _, o in moved]))

    @property
    def coverage(self) -> float:
        """Share of gold tokens inside the kept set."""
        return (self.gold >= 0).double().mean().item()

    def derivatives(self, mu: float) -> tuple[float, float, float]:
        """Mean NLL over the covered gold tokens at strength mu, and its first two derivatives in mu (convex)."""
        nll, first, second = self._per_token(mu)
        return nll.mean().item(), first.mean().item(), second.mean().item()

    def nll(self, mu: float) -> Tensor:
        """(covered tokens,) float64: NLL of each covered gold token at strength mu."""
        return self._per_token(mu)[0]

    def _per_token(self, mu: float) -> tuple[Tensor, Tensor, Tensor]:
        covered = self.gold >= 0
        ends = torch.cat([self.offsets[1:], self.offsets.new_tensor([len(self.logprobs)])])
        row = torch.repeat_interleave(torch.arange(len(self.offsets)), ends - self.offsets)
        deltas = self.deltas.double()
        steered = self.logprobs.double() + mu * deltas

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(len(self.offsets)).index_add_(0, row, values)

        top = steered.new_full((len(self.offsets),), -math.inf).scatter_reduce_(0, row, steered, "amax")
        weights = (steered - top[row]).exp()
        mass = total(weights)
        weights = weights / mass[row]
        mean = total(weights * deltas)
        variance = total(weights * (deltas - mean[row]).square())
        gold = self.gold[covered]
        nll = (top + mass.log())[covered] - steered[gold]
        return nll, mean[covered] - deltas[gold], variance[covered]


def mean(tokens: TokenStatistics) -> float:
    """Mean of the tokens' own strengths (Eq. 44: what the paper uses). Heavy-tailed."""
    return tokens.mu_star.double().mean().item()


def median(tokens: TokenStatistics) -> float:
    """Median of the tokens' own strengths (Eq. 45)."""
    return tokens.mu_star.double().median().item()


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
    _, slope, curvature = tokens.derivatives(0.0)
    if slope == 0 and curvature == 0:
        return 0.0
    direction = -math.copysign(1.0, slope)
    step = 1.0
    while direction * tokens.derivatives(direction * step)[1] < 0:
        step *= 2
        if step >= MAX_STRENGTH:
            return direction * MAX_STRENGTH
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
