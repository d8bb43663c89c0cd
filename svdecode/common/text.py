"""Texts of other packages, for our own messages."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty, or its type where it has none: our messages are one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
