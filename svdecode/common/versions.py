"""The versions of other packages that svdecode was tested with, and a sentence for each installed one outside of them."""

from __future__ import annotations

import functools
import re
import warnings
from importlib import metadata

TESTED = {
    "torch": ((2, 11), (2, 13)),
    "triton": ((3, 6), (3, 9)),
    "transformers": ((5, 17), (5, 24)),
    "peft": ((0, 19), (0, 21)),
}
"""The oldest and the newest (major, minor) version of each package that the tests have passed with."""


def installed() -> dict[str, str | None]:
    """The version of each package in `TESTED`, None where it is not installed."""
    return {name: _version(name) for name in TESTED}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def untested(versions: dict[str, str | None] | None = None) -> list[str]:
    """A sentence for each version outside the tested range.

    Args:
        versions: by package; None for the installed ones.
    """
    found = []
    for name, version in (installed() if versions is None else versions).items():
        numbers = tuple(map(int, re.findall(r"\d+", version or "")[:2]))
        oldest, newest = TESTED[name]
        if numbers and not oldest <= numbers <= newest:
            low, high = (".".join(map(str, end)) for end in (oldest, newest))
            found.append(f"{name} {version} is outside the versions that svdecode was tested with, {low} to {high}.")
    return found


@functools.cache
def warn_untested() -> None:
    """Warn of each version outside the tested range, once in a process."""
    for sentence in untested():
        warnings.warn(sentence, stacklevel=3)
