"""The settings that a selection compares."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from svdecode.constants import ALPHA, DIRECTIONS, KL
from svdecode.ops.setting import Setting
from svdecode.strength.family import Family


class Grid(NamedTuple):
    """The settings to compare: every combination, and the warm start alone."""

    mus: tuple[float, ...]
    alphas: tuple[float, ...]
    penalties: tuple[float, ...]
    directions: tuple[str, ...] = DIRECTIONS

    def settings(self) -> list[Setting]:
        """The warm start first, then weaker before stronger steering."""
        rest = itertools.product(sorted(self.mus), self.alphas, self.penalties, self.directions)
        return [Setting(0.0, ALPHA, self.penalties[0], KL), *itertools.starmap(Setting, rest)]


class Scale(NamedTuple):
    """The settings to compare: multiples of the exact strength of every direction, threshold and penalty."""

    factors: tuple[float, ...]
    penalties: tuple[float, ...]
    alphas: tuple[float, ...] = (0.0, 0.01, ALPHA)
    directions: tuple[str, ...] = DIRECTIONS

    def families(self) -> list[Family]:
        """Where nothing is outside the kept set, one penalty is as good as another."""
        return [
            Family(direction, alpha, penalty)
            for direction, alpha in itertools.product(self.directions, self.alphas)
            for penalty in (self.penalties if alpha > 0 else self.penalties[:1])
        ]

    def settings(self, exact: dict[Family, float]) -> list[Setting]:
        """The warm start first, which cuts nothing off; then weaker before stronger steering."""
        rest = [(factor, family) for factor in sorted(self.factors) for family in exact]
        return [Setting(0.0, 0.0, self.penalties[0], KL), *(f.setting(factor * exact[f]) for factor, f in rest)]
