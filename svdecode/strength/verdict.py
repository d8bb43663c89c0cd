"""Whether a calibration shows that steering helps, as one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdecode.strength.calibration import Calibration

HOW_JUDGED = {
    "calibration": "on the calibration data, which chose mu and so flatters it",
    "held_out": "on held-out data",
    "cross_fitted": "by cross-fitting (each half of the data at the strength of the other half)",
}
"""What the kinds of gains mean."""


def verdict_of(c: Calibration) -> str:
    """One sentence: whether a gain is shown, on data that did not choose the setting, and how large it is."""
    if c.selection is not None and c.gains.get("held_out") is None:
        found, unit = c.selection["cross_fitted"], f"of {c.selection['metric']}"
        how = "by cross-fitting (each half of the data at the setting that is best on the other half)"
    else:
        which = "held_out" if "held_out" in c.gains else "cross_fitted"
        found, unit, how = c.gains.get(which), "nats per token", HOW_JUDGED[which]
    if found is None or found["interval"] is None:
        return "Whether steering helps is not known: there are too few sequences for an interval; pass held-out data."
    low, high = found["interval"]
    measured = f"{how}, {found['gain']:+.4f} {unit}, 95% interval [{low:+.4f}, {high:+.4f}]"
    if low > 0:
        return f"A gain is shown {measured}."
    if high < 0:
        return f"Steering makes it worse {measured}."
    return f"No gain is shown {measured}, which contains 0."
