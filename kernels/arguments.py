"""Arguments as the kernels take them: the threshold, and where mu comes from."""

from __future__ import annotations

import math

from torch import Tensor

from svdecode.kernels.kept_sums import NUMBER, OWN, PER_ROW
from svdecode.ops.mu import number_or_rows


def log_threshold(alpha: float) -> float:
    """log(alpha), -inf for 0."""
    return math.log(alpha) if alpha > 0 else -math.inf


def strength_source(mu: float | Tensor | None, logits: Tensor) -> tuple[int, float, Tensor | None]:
    """(source, number, per-row tensor)."""
    number, rows = number_or_rows(mu, logits)
    return (OWN if mu is None else NUMBER if rows is None else PER_ROW).value, number, rows
