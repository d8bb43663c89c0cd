"""Tables for the terminal, which fit 80 columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence

WIDE = 1000
"""Columns in which every table of ours fits as it is."""


def print_table(
    title: str | None, head: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = ("",)
) -> None:
    """Print a table on stdout.

    Where it is wider than the terminal, an interval goes below its value, and the columns of words are broken between words.
    Numbers are never broken.

    Args:
        title: above the table; None for none.
        head: names of the columns.
        rows: the cells, as plain text.
        words: the columns that hold words.
    """
    # Imported here: `svdecode --help` does not need rich.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def table(narrow: bool) -> Table:
        made = Table(title=None if title is None else Text(title))
        for name in head:
            breaks = name in words
            made.add_column(Text(name.replace(" ", "\n") if narrow and not breaks else name), no_wrap=not breaks)
        for row in rows:
            cells = zip(head, row, strict=True)
            made.add_row(*(Text(c.replace(" [", "\n[") if narrow and name not in words else c) for name, c in cells))
        return made

    wide = table(narrow=False)
    fits = wide.__rich_measure__(console, console.options.update(max_width=WIDE)).maximum <= console.width
    console.print(wide if fits else table(narrow=True))
