"""The NLL of gold tokens over the strength mu, sequence by sequence; its memory knows neither vocabulary nor kept set.

With delta fixed, a token's NLL is a log-sum-exp of functions that are affine in mu, minus such a function: it is convex. A
finite penalty below 0 adds |mu| to one of them, so that it is convex on mu >= 0 and on mu <= 0, with a kink at 0 between them.
Hence 0 stands twice in the grid, once as the end of each half, with the slope of that side.

Between two strengths of the grid, value, slope and curvature at both ends fix a polynomial of degree 5. Convexity bounds the
truth from both sides (the chord above, the tangents below), and the polynomial is held between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_BISECTIONS = 50


@dataclass
class NLLCurve:
    """Sums over the gold tokens of each of S sequences, at M strengths."""

    mus: Tensor  # (M,) float64, rising; 0 stands twice, as the end of each half
    sums: Tensor  # (S, M, 3) float64: NLL (nats) and its first two derivatives in mu, summed over a sequence's scored tokens
    ends: Tensor  # (S, 2) float64: the limits of that slope at mu = -infinity (<= 0) and +infinity (>= 0)
    scored: Tensor  # (S,) int64: gold tokens with a finite NLL; with a penalty of -inf those in the kept set
    gold: Tensor  # (S,) int64: all gold tokens

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.scored)

    @property
    def coverage(self) -> float:
        """Share of gold tokens that are scored."""
        return (self.scored.sum() / self.gold.sum()).item()

    @property
    def bytes(self) -> int:
        """What the curve takes."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def select(self, sequences: Tensor) -> NLLCurve:
        """The given sequences, (S,) bool or indices."""
        return NLLCurve(
            self.mus, self.sums[sequences], self.ends[sequences], self.scored[sequences], self.gold[sequences]
        )

    def refined(self, mus: Tensor, sums: Tensor) -> NLLCurve:
        """With more strengths, (N,), none of them 0, and what was found there, (S, N, 3)."""
        both = torch.cat([self.mus, mus])
        order = both.argsort(stable=True)
        return NLLCurve(both[order], torch.cat([self.sums, sums], 1)[:, order], self.ends, self.scored, self.gold)

    def at(self, mu: float) -> Tensor:
        """(S,) float64: the NLL of each sequence's scored tokens at strength mu, summed."""
        return self._values(self.sums, torch.full((len(self),), float(mu), dtype=torch.float64))

    def mean(self, mu: float) -> float:
        """Mean NLL of all scored tokens at strength mu, nats."""
        at = torch.tensor([float(mu)], dtype=torch.float64)
        return (self._values(self.sums.sum(0, keepdim=True), at) / self.scored.sum()).item()

    def minima(self, counts: Tensor | None = None) -> Tensor:
        """(R,) float64: the strengths with the least NLL, of R weightings `counts` (R, S) of the sequences; None is all, once.

        A curve that falls to the end of the grid has its minimum there; a flat one has it at 0; NaN is one without tokens.
        """
        if counts is None:
            counts = torch.ones(1, len(self), dtype=torch.float64)
        drawn = (counts @ self.sums.flatten(1)).unflatten(1, self.sums.shape[1:])
        lowest, highest = (counts @ self.ends).unbind(1)
        low, high = (_half_minimum(self.mus[half], drawn[:, half]) for half in self._halves())
        # The root at the end of a half is 0 where the minimum lies in the other half.
        found = torch.where(self._values(drawn, high) <= self._values(drawn, low), high, low)
        # The slope itself no longer shows that a curve falls for ever once it underflows.
        found = torch.where(highest == 0, self.mus[-1], torch.where(lowest == 0, self.mus[0], found))
        found = torch.where((lowest == 0) & (highest == 0), 0.0, found)
        return torch.where(counts @ self.scored.double() == 0, math.nan, found)

    def error(self) -> float:
        """How far the minimum may be off, as an estimate: a quarter of how far it moves without the strengths beside it.

        The cubic's error grows with the fourth power of the distance between strengths, so that the true one is less.
        """
        found = self.minima()
        if not bool(found.isfinite()):
            return 0.0
        left = int((self.mus < found).sum()) - 1
        moved = [0.0]
        for near in (left, left + 1):
            if 0 < near < len(self.mus) - 1 and self.mus[near] != 0:
                rest = torch.arange(len(self.mus)) != near
                without = NLLCurve(self.mus[rest], self.sums[:, rest], self.ends, self.scored, self.gold)
                moved.append((without.minima() - found).abs().item() / 4)
        return max(moved)

    def _halves(self) -> tuple[slice, slice]:
        middle = int((self.mus < 0).sum()) + 1
        return slice(0, middle), slice(middle, None)

    def _values(self, sums: Tensor, at: Tensor) -> Tensor:
        """(R,): curve r of `sums` (R, M, 3) at strength `at` (R,); beyond the grid along the tangent."""
        halves = [_interpolated(self.mus[half], sums[:, half], at) for half in self._halves()]
        return torch.where(at < 0, *halves)


def with_both_zeros(mus: Tensor) -> Tensor:
    """A curve's grid of strengths (N,): rising, each once, but 0 twice, as the end of each half."""
    mus = mus[mus != 0].unique()
    return torch.cat([mus[mus < 0], mus.new_zeros(2), mus[mus > 0]])


def _interval(mus: Tensor, sums: Tensor, left: Tensor) -> tuple[Tensor, ...]:
    """Width (R,), and value, slope times width and curvature times width squared at both ends of interval `left`."""
    width = mus[left + 1] - mus[left]
    ends = []
    for side in (left, left + 1):
        value, slope, curvature = sums[torch.arange(len(left)), side].unbind(1)
        ends += [value, slope * width, curvature * width * width]
    return width, *ends


def _interpolated(mus: Tensor, sums: Tensor, at: Tensor) -> Tensor:
    inside = at.clamp(mus[0], mus[-1])
    left = (torch.searchsorted(mus, inside, right=True) - 1).clamp(0, len(mus) - 2)
    width, f0, d0, c0, f1, d1, c1 = _interval(mus, sums, left)
    t = (inside - mus[left]) / width
    s = 1 - t

    def near(x: Tensor, y: Tensor, f: Tensor, d: Tensor, c: Tensor) -> Tensor:
        """The half of the polynomial that belongs to one end, x away from it and y from the other."""
        return y**3 * (f * (1 + 3 * x + 6 * x * x) + d * (x + 3 * x * x) + c * x * x / 2)

    value = near(t, s, f0, d0, c0) + near(s, t, f1, -d1, c1)
    value = torch.maximum(value, torch.maximum(f0 + t * d0, f1 - s * d1)).minimum(s * f0 + t * f1)
    slope = torch.where(at < mus[0], sums[:, 0, 1], sums[:, -1, 1])
    return value + torch.where(at == inside, 0.0, slope * (at - inside))


def _half_minimum(mus: Tensor, sums: Tensor) -> Tensor:
    """(R,) where the slope of each curve, which rises, meets 0; an end of the grid where it does not."""
    slope = sums[:, :, 1]
    below = (slope < 0).sum(1)
    left = (below - 1).clamp(0, len(mus) - 2)
    width, _, d0, c0, _, d1, c1 = _interval(mus, sums, left)
    low, high = torch.zeros_like(width), torch.ones_like(width)
    for _ in range(_BISECTIONS):  # on the cubic through the slopes and curvatures at both ends
        t = (low + high) / 2
        s = 1 - t
        value = s * s * ((1 + 2 * t) * d0 + t * c0) + t * t * ((1 + 2 * s) * d1 - s * c1)
        low, high = torch.where(value < 0, t, low), torch.where(value < 0, high, t)
    found = mus[left] + width * (low + high) / 2
    return torch.where(below == 0, mus[0], torch.where(below == len(mus), mus[-1], found))
