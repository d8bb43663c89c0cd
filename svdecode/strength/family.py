"""`Family`: a way of changing the warm start that has one strength to choose."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdecode.constants import ALPHA, KL, PENALTY, Direction
from svdecode.ops.setting import Setting
from svdecode.strength.nll_curve import with_both_zeros

TEMPERATURE = "temperature"
"""Not a steering direction, but what one must beat: delta = log p, so that the logits are multiplied by 1 + mu = 1 / T."""

MAX_STRENGTH = 1e3
"""Where the search ends: the NLL may fall for ever when each gold token has the largest delta of its kept set."""

_STEPS_OF_4 = (0.03, 0.125, 0.5, 2.0, 8.0, 32.0, 128.0, MAX_STRENGTH)
_TEMPERATURES = (10.0, 5.0, 2.5, 1.6, 1.25, 0.8, 0.625, 0.4, 0.2, 0.1)


class Family(NamedTuple):
    """Direction, threshold and penalty: a `Setting` whose strength is still to be found."""

    direction: str = KL
    """A steering direction, or `TEMPERATURE`."""
    alpha: float = ALPHA
    penalty: float = PENALTY

    def setting(self, mu: float) -> Setting:
        """With a strength. Not for `TEMPERATURE`."""
        direction: Direction = self.direction  # type: ignore[assignment]
        return Setting(mu, self.alpha, self.penalty, direction)

    @property
    def keywords(self) -> dict[str, Any]:
        """As keyword arguments of an operator. Not for `TEMPERATURE`."""
        return self.setting(0.0).keywords

    def coarse(self) -> Tensor:
        """(M,) float64: strengths of either sign, rising, for a first look; 0 twice (`svdecode.strength.nll_curve`)."""
        if self.direction == TEMPERATURE:
            return with_both_zeros(torch.tensor([1 / t - 1 for t in _TEMPERATURES], dtype=torch.float64))
        half = torch.tensor(_STEPS_OF_4, dtype=torch.float64)
        return with_both_zeros(torch.cat([-half, half]))


def temperature_of(mu: float) -> float:
    """The temperature that a strength of `TEMPERATURE` stands for."""
    return 1 / (1 + mu)
