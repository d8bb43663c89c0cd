"""What all figures share: pyplot without a window, one palette, and files that appear whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.common.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"
DOTS_PER_INCH = 130


def load_pyplot():
    """matplotlib.pyplot without a window; ImportError names the extra."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'svdecode[train]'") from None
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def figure_format(path: str | Path) -> str:
    """The format of a figure by the ending of its file, "png" without one; ValueError for one that matplotlib cannot write."""
    ending = Path(path).suffix.lower().lstrip(".") or "png"
    known = load_pyplot().figure().canvas.get_supported_filetypes()
    load_pyplot().close()
    if ending not in known:
        raise ValueError(f"{path}: a figure ends in one of {', '.join(sorted(known))}, not in .{ending}")
    return ending


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically, in the format of the file's ending, and close it."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DOTS_PER_INCH, format=figure_format(path))
    write_atomically(path, content.getvalue())
    load_pyplot().close(figure)
