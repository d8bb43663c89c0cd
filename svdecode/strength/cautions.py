"""What a strength, or the data behind it, cannot show: said in words, and by a code for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svdecode.strength.family import MAX_STRENGTH

if TYPE_CHECKING:
    from svdecode.strength.calibration import Calibration

LEAST_SEQUENCES = 20
"""With fewer, a bootstrap interval of 95% is too narrow: it knows no sequence but these."""

LOW_COVERAGE = 0.5
"""With less, most gold tokens are outside the kept set, where no strength reaches them."""

Caution = dict[str, str]  # {"code", "text"}


def few(count: int, what: str) -> list[Caution]:
    """Of an interval that rests on few of something."""
    if count >= LEAST_SEQUENCES:
        return []
    plural = what if count != 1 else what.removesuffix("s")
    effect = "there is no interval" if count < 2 else "the intervals are too narrow"
    return [{"code": "few", "text": f"{count} {plural} {'are' if count != 1 else 'is'} few: {effect}."}]


def about_judges(seen: int, count: int, what: str) -> list[Caution]:
    """Of data that chose the strength and judge it."""
    if not seen:
        return []
    text = f"{seen} of these {count} {what} chose the strength, and so flatter it: judge it on others."
    return [{"code": "calibration_data_judge", "text": text}]


def about_strength(c: Calibration) -> list[Caution]:
    """Of a strength at the end of the search, and of one that hardly matters."""
    found = []
    ends = c.intervals.get("exact") or []
    if abs(c.estimates["exact"]) >= MAX_STRENGTH:
        chosen = "mu" if c.estimator == "exact" else "the exact strength"
        mu = c.estimates["exact"]
        text = f"{chosen} = {mu:g} is the end of the search and no optimum: more steering always looks better."
        found.append({"code": "end_of_search", "text": text})
    elif any(abs(end) >= MAX_STRENGTH for end in ends):
        text = (
            f"the interval of the exact strength reaches {MAX_STRENGTH:g}, the end of the search: mu is hardly known."
        )
        found.append({"code": "end_of_search", "text": text})
    if c.coverage < LOW_COVERAGE:
        text = (
            f"only {c.coverage:.0%} of the gold tokens are in the kept set; the others cannot be chosen at any strength, so "
            f"that mu hardly matters: train on, or use a smaller alpha than {c.alpha:g}."
        )
        found.append({"code": "low_coverage", "text": text})
    return found
