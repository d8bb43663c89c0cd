"""Numbers as a reader sees them, and the levels of colour that stand for them."""

from __future__ import annotations

import bisect
import itertools
import math

KL_LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Nats from which on a step has the next stronger colour; the same on every page, so that pages can be compared."""
MOVED_LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5)
"""Changes of a probability, in either direction."""
MINUS = "\u2212"


def probability(value: float) -> str:
    """Three decimals; what is not 0 or 1 does not look like it."""
    if 0 < value < 0.0005:
        return "<0.001"
    return ">0.999" if 0.9995 <= value < 1 else f"{value:.3f}" if 0 < value < 1 else f"{value:.0f}"


def change(value: float) -> str:
    """A difference of probabilities, with its sign; a minus sign and not a hyphen."""
    shown = f"{abs(value):.3f}"
    if float(shown) == 0:
        return "0.000"
    return f"{'+' if value > 0 else MINUS}{shown}"


def nats(value: float) -> str:
    """A divergence."""
    return "infinite" if math.isinf(value) else "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"


def level(value: float, levels: tuple[float, ...]) -> int:
    """0 for less than the first of `levels`, and so on; with the sign of `value`."""
    found = bisect.bisect_right(levels, abs(value))
    return -found if value < 0 else found


def ranges(levels: tuple[float, ...]) -> list[str]:
    """What each level stands for."""
    inner = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(levels)]
    return [f"below {levels[0]:g}", *inner, f"{levels[-1]:g} and more"]
