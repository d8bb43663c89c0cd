"""The figure of an evaluation: what each system changes against the warm start.

Every point has its 95% interval. A filled point's interval excludes 0, a hollow one's contains it. No axis is narrower than
`SMALLEST_REACH`, so that noise does not look large. Markers tell what colours tell.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.common.figures import BLUE, GREY, ORANGE, load_pyplot, save_figure
from svdecode.evaluation.tasks import find_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from svdecode.evaluation.report import Report

SMALLEST_REACH = 0.02
"""An axis of differences goes at least so far from 0: 2 points of a share, 0.02 nats."""

_OUTLIER = 4.0  # times the median reach of the intervals: what lies beyond becomes an arrow at the edge
HOW_TO_READ = "95% intervals; filled: the interval excludes 0, hollow: it contains 0"


def plot_report(report: Report, path: str | Path) -> None:
    """A panel per metric. With a warm start: each system's paired difference to it, and its mean at the right edge.

    Args:
        report: of `svdecode.evaluation.run.evaluate`; without a warm start the values themselves are drawn.
        path: the file, in the format of its ending.
    """
    pyplot = load_pyplot()
    metrics = list(report.results) or [""]
    names = list(report.systems)
    better = {one.name: "right" if one.higher_is_better else "left" for one in find_task(report.task).metrics}
    figure, panels = pyplot.subplots(
        1, len(metrics), figsize=(3.4 + 3.9 * len(metrics), 1.9 + 0.32 * len(names)),
        layout="constrained", sharey=True, squeeze=False,
    )  # fmt: skip
    for metric, axes in zip(metrics, panels[0], strict=True):
        values = report.results.get(metric, {})
        if report.comparisons:
            draw_differences(axes, names, report.comparisons.get(metric, {}), values)
            axes.set_xlabel(f"{metric}: difference to {report.baseline}\n({better[metric]} of 0 is better)", fontsize=9)
        else:
            draw_values(axes, names, values)
            axes.set_xlabel(f"{metric} (95% interval)" if metric else "no answer has a verdict")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.4, -0.6)
    head = f"{report.task}: {report.model}, {report.questions} questions"
    figure.suptitle(f"{head}\n{HOW_TO_READ}, on the same questions" if report.comparisons else head, fontsize=10)
    save_figure(figure, path)


def draw_values(axes: Axes, names: Sequence[str], found: dict[str, dict]) -> None:
    """Each system's value with its 95% interval, one below the other; found: system -> {"mean", "interval"}."""
    for row, name in enumerate(names):
        if name in found:
            low, high = ends_of(found[name], "mean")
            axes.plot([low, high], [row, row], color=_colour(name), linewidth=2)
            axes.plot(found[name]["mean"], row, _marker(name), color=_colour(name), markersize=6)
    axes.grid(axis="x", alpha=0.25)


def draw_differences(axes: Axes, names: Sequence[str], found: dict[str, dict], values: dict[str, dict]) -> None:
    """Each system's paired difference with its 95% interval, one below the other; arrows at the edge for what lies far out.

    Args:
        axes: where to draw.
        names: the systems from top to bottom; one without a difference is what the others are compared with, and lies at 0.
        found: system -> {"difference", "interval"}.
        values: system -> {"mean"}, written at the right edge.
    """
    low, high = _view([found[name] for name in names if name in found])
    for row, name in enumerate(names):
        colour, marker = _colour(name), _marker(name)
        if name not in found:
            if name in values:
                axes.plot(0.0, row, marker, color=colour, markersize=6)
            continue
        difference, (start, end) = found[name]["difference"], ends_of(found[name], "difference")
        if end >= low and start <= high:
            axes.plot([max(start, low), min(end, high)], [row, row], color=colour, linewidth=2)
        face = "white" if start <= 0 <= end or found[name]["interval"] is None else colour
        for edge, arrow, out in ((low, "<", start < low), (high, ">", end > high)):
            if out:
                axes.plot(edge, row, arrow, color=colour, markerfacecolor=face, markersize=7, clip_on=False, zorder=3)
        if low <= difference <= high:
            axes.plot(difference, row, marker, color=colour, markerfacecolor=face, markersize=6, zorder=3)
        else:
            side, shift = ("left", 9) if difference < low else ("right", -9)
            axes.annotate(
                f"{difference:+.3g}", (low if side == "left" else high, row), (shift, 0), va="center", ha=side,
                textcoords="offset points", fontsize=8, color=colour,
            )  # fmt: skip
    axes.set_xlim(low, high)
    axes.axvline(0.0, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axes.grid(axis="x", alpha=0.25)
    right = axes.twinx()
    shown = [(row, name) for row, name in enumerate(names) if name in values]
    right.set_ylim(len(names) - 0.4, -0.6)
    right.set_yticks([row for row, _ in shown], [f"{values[name]['mean']:.3f}" for _, name in shown], fontsize=8)
    right.tick_params(length=0, pad=8)  # past the arrows at the edge
    right.set_title("mean", loc="right", fontsize=8)


def ends_of(found: dict, name: str) -> tuple[float, float]:
    """The interval, or the value twice where there is none."""
    low, high = found["interval"] or (found[name], found[name])
    return low, high


def _view(rows: Sequence[dict]) -> tuple[float, float]:
    """From where to where the differences are drawn: all but the outliers, with 0, and no less than SMALLEST_REACH."""
    intervals = [ends_of(row, "difference") for row in rows]
    reaches = [max(map(abs, ends)) for ends in intervals]
    limit = max(_OUTLIER * statistics.median_low(reaches or [0.0]), SMALLEST_REACH)
    ends = [end for found, reach in zip(intervals, reaches, strict=True) if reach <= limit for end in found]
    low, high = min([*ends, -SMALLEST_REACH]), max([*ends, SMALLEST_REACH])
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _colour(name: str) -> str:
    return ORANGE if name.startswith("SVDecode") else GREY if name.startswith(("pre-trained", "warm")) else BLUE


def _marker(name: str) -> str:
    return "o" if name.startswith("SVDecode") else "s" if name.startswith(("pre-trained", "warm")) else "D"
