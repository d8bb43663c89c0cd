"""How sure a share or a difference is: Wilson's interval, the bootstrap, McNemar's test."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z95 = 1.96
RESAMPLES = 2000


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a share (Wilson's score)."""
    share = successes / trials
    centre = share + Z95**2 / (2 * trials)
    spread = Z95 * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    low, high = (min(max((centre + sign * spread) / (1 + Z95**2 / trials), 0.0), 1.0) for sign in (-1, 1))
    return low, high


def resamples(count: int, seed: int = 0, number: int = RESAMPLES) -> Tensor:
    """(number, count) int64: bootstrap draws of `count` items, with replacement; the same for the same seed."""
    return torch.randint(count, (number, count), generator=torch.Generator().manual_seed(seed))


def bootstrap_interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (N,), which may be paired differences."""
    means = values.double()[resamples(len(values), seed)].mean(-1)
    return means.quantile(0.025).item(), means.quantile(0.975).item()


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Exact two-sided p-value that two methods are right equally often, from (N,) bools on the same questions."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    disagreements = only_first + only_second
    tail = sum(math.comb(disagreements, k) for k in range(min(only_first, only_second) + 1)) / 2**disagreements
    return min(1.0, 2 * tail)
