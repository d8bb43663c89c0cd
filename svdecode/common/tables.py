"""Numbers as text: Markdown tables, and values with their intervals."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, each line with its end."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def bounds(interval: Sequence[float] | None, digits: int = 4, sign: str = "") -> str:
    """An interval as text, "none" where there is none; `sign` is "+" for differences."""
    return "none" if interval is None else "[" + ", ".join(f"{end:{sign}.{digits}f}" for end in interval) + "]"


def with_interval(found: dict | None, name: str, digits: int = 3, sign: str = "") -> str:
    """found[name] and found["interval"] as "0.158 [0.104, 0.234]"; empty without `found`."""
    return f"{found[name]:{sign}.{digits}f} {bounds(found['interval'], digits, sign)}" if found else ""
