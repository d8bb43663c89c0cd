"""`Setting`: one way of steering, as one object."""

from __future__ import annotations

from typing import Any, NamedTuple

from svdecode.constants import ALPHA, KL, PENALTY, Direction
from svdecode.ops import validation


class Setting(NamedTuple):
    """Strength, threshold, penalty and direction: what `svdecode.fused_steer` takes beside the logits. Immutable."""

    mu: float
    """Steering strength; 0 is the warm start, whatever the rest is."""
    alpha: float = ALPHA
    """Confidence threshold in [0, 1]; 0 keeps every token."""
    penalty: float = PENALTY
    """lambda <= 0, for tokens outside the kept set."""
    direction: Direction = KL
    """One of "kl" for delta = p * c, "log_ratio" for delta = c."""

    def check(self) -> Setting:
        """Return it if all four are in range; TypeError or ValueError names the one that is not."""
        validation.check_finite("mu", self.mu)
        validation.check_settings(self.alpha, self.direction, self.penalty)
        return self

    @property
    def keywords(self) -> dict[str, Any]:
        """All but the strength, as keyword arguments of an operator."""
        return {"alpha": self.alpha, "penalty": self.penalty, "direction": self.direction}
