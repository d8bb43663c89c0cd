"""The figure of a warm start's checkpoints: the best way of decoding, what it is worth in steps, and the paper's setting.

The best way is a circle on a solid line, the temperature a diamond on a dashed one, the warm start a square: colours say
nothing that markers and labels do not say too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.common.figures import BLUE, GREY, ORANGE, load_pyplot, save_figure
from svdecode.evaluation.figures import HOW_TO_READ, SMALLEST_REACH, ends_of
from svdecode.evaluation.steps_report import best_label
from svdecode.evaluation.tasks import find_task
from svdecode.strength.fair_table import temperature_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LABELS = 12
_TEXT = "#4a5568"
_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
_APART = 0.1  # of the distance between two checkpoints: how far best way and temperature stand to the left and right


def plot_steps(rows: list[dict], metric: str, task: str, path: str | Path) -> None:
    """Four panels over warm-start steps.

    Above, over all gold tokens and the whole vocabulary, the change by the best way and by the best temperature, and what the
    best way is worth in steps; below, under the paper's setting, the change in the kept gold tokens and in the task's metric.

    Args:
        rows: of `svdecode.evaluation.steps.evaluate_steps`.
        metric: the task's first.
        task: its name.
        path: the file, in the format of its ending.
    """
    pyplot = load_pyplot()
    figure, ((ways, worth), (kept, scores)) = pyplot.subplots(2, 2, figsize=(12, 9.4), layout="constrained")
    draw_ways_over_steps(ways, rows)
    ways.set_title("All gold tokens, whole vocabulary: best way against best temperature", fontsize=10)
    draw_worth(worth, rows)
    worth.set_title("What the best way is worth in steps of the warm start alone", fontsize=10)
    draw_change_over_steps(kept, rows, "nll", "NLL, nats per kept gold token\n(below 0 is better)")
    kept.set_title("The paper's setting: kept gold tokens (numbers: warm start, then SVDecode)", fontsize=10)
    up = next(one.higher_is_better for one in find_task(task).metrics if one.name == metric)
    draw_change_over_steps(scores, rows, "metric", f"{metric} ({'above' if up else 'below'} 0 is better)")
    scores.set_title(f"The paper's setting: {metric} (numbers: warm start, then SVDecode)", fontsize=10)
    head = f"{task}: what steering changes after each checkpoint of the warm start, test questions"
    figure.suptitle(f"{head}\n{HOW_TO_READ}", fontsize=11)
    save_figure(figure, path)


def draw_ways_over_steps(axes: Axes, rows: Sequence[dict], worth: bool = False) -> None:
    """The change of NLL after each checkpoint by the best way and by the best temperature, each with its 95% interval.

    Args:
        axes: where to draw.
        rows: {"step", "best", "temperature"} each, as `svdecode.evaluation.steps.evaluate_steps` gives.
        worth: whether the best way's worth in steps stands below each checkpoint.
    """
    ends = [0.0]
    kinds = (
        ("best", "o", "-", ORANGE, -_APART, "best way", best_label),
        ("temperature", "D", "--", BLUE, _APART, "best temperature", temperature_label),
    )
    for key, marker, dashes, colour, shift, name, label in kinds:
        for place, row in enumerate(rows):
            found, x = row[key], place + shift
            # A gain is how much the NLL falls; here it is how the NLL changes.
            low, high = (-end for end in reversed(ends_of(found, "gain")))
            face = "white" if found["interval"] is None or low <= 0 <= high else colour
            axes.plot([x, x], [low, high], color=colour, linestyle=dashes, linewidth=2, marker="_", markersize=8)
            axes.plot(
                x, -found["gain"], marker, color=colour, markerfacecolor=face, markersize=7, zorder=3,
                label=None if place else name,
            )  # fmt: skip
            ends += [low, high]
            if len(rows) <= _MOST_LABELS:
                # Below the best way and above the temperature: neighbours do not meet.
                above = key == "temperature"
                axes.annotate(
                    label(found).replace(", ", "\n"), (x, high if above else low), (0, 5 if above else -5), fontsize=8,
                    textcoords="offset points", va="bottom" if above else "top", ha="center", color=_TEXT, bbox=_BOX,
                )  # fmt: skip
    below = ["\nworth " + row["worth"]["text"].replace(" [", "\n[") if worth else "" for row in rows]
    _finish(axes, rows, ends, [f"{row['step']}{more}" for row, more in zip(rows, below, strict=True)])
    axes.set_ylabel("change of NLL, nats per gold token\n(below 0 is better)", fontsize=9)
    axes.legend(fontsize=8, loc="best")


def draw_worth(axes: Axes, rows: Sequence[dict]) -> None:
    """The warm start's NLL over its steps, each checkpoint steered in the best way, and where the curve has that NLL.

    An interval that leaves the steps of the checkpoints ends in an arrow at the edge.

    Args:
        axes: where to draw.
        rows: {"step", "warm_start", "best", "worth"} each, as `svdecode.evaluation.steps.evaluate_steps` gives.
    """
    steps = [row["step"] for row in rows]
    at = [math.log1p(step) for step in steps]
    reach = max(at[-1] - at[0], 1.0)
    low, high = at[0] - 0.55 * reach, at[-1] + 0.25 * reach  # room for the labels on the left, below the curve

    def place(value: float) -> float:
        """Steps on the axis; what is known only to lie beyond is at the edge."""
        value = float(value)  # "inf" in a file
        return low if value == 0 else high if math.isinf(value) else math.log1p(value)

    axes.plot(
        at,
        [row["warm_start"]["nll"] for row in rows],
        "s-",
        color=GREY,
        linewidth=1.5,
        label="warm start alone",
    )
    for index, (x, row) in enumerate(zip(at, rows, strict=True)):
        y, worth = row["best"]["nll"], row["worth"]
        to = place(worth["steps"])
        axes.plot([x, to], [y, y], color=ORANGE, linestyle=":", linewidth=1.5, zorder=2)
        axes.plot(
            x, y, "o", color=ORANGE, markersize=7, zorder=4, label=None if index else "the same checkpoint, best way"
        )  # fmt: skip
        if worth["interval"] is not None:
            axes.plot(
                [place(end) for end in worth["interval"]], [y, y], color=ORANGE, linewidth=5, alpha=0.35, zorder=1
            )
        for value in (worth["steps"], *(worth["interval"] or ())):
            if place(value) in (low, high):
                axes.plot(
                    place(value), y, "<" if place(value) == low else ">", color=ORANGE, markersize=7, clip_on=False
                )
        if low < to < high:
            axes.plot(to, y, "|", color=ORANGE, markersize=14, markeredgewidth=2, zorder=3)
        if len(rows) <= _MOST_LABELS:
            axes.annotate(
                f"{row['step']} steered =\n{worth['text']}", (x, y), (-9, -3), textcoords="offset points", fontsize=8,
                va="top", ha="right", color=_TEXT, bbox=_BOX,
            )  # fmt: skip
    axes.set_xlim(low, high)
    shown = range(0, len(rows), -(-len(rows) // _MOST_LABELS))
    axes.set_xticks([at[i] for i in shown], [str(steps[i]) for i in shown], fontsize=8)
    axes.margins(y=0.15)
    axes.set_xlabel("warm-start steps, log scale (bar and band: steps of the same NLL, 95%)")
    axes.set_ylabel("NLL, nats per gold token", fontsize=9)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=8, loc="best")


def draw_change_over_steps(axes: Axes, rows: list[dict], key: str, label: str) -> None:
    """The paired difference of SVDecode to the warm start after each checkpoint, with its 95% interval and both values.

    Args:
        axes: where to draw.
        rows: {"step", "mu", "coverage", key, f"{key}_difference"} each, as `svdecode.evaluation.steps.evaluate_steps` gives.
        key: "nll" or "metric".
        label: what is measured, and its unit.
    """
    ends = [0.0]
    for place, row in enumerate(rows):
        found, values = row.get(f"{key}_difference"), row.get(key, {})
        if not found:
            continue
        difference = found["difference"]
        low, high = ends_of(found, "difference")
        face = "white" if low <= 0 <= high or found["interval"] is None else ORANGE
        axes.plot([place, place], [low, high], color=ORANGE, linewidth=2, marker="_", markersize=8)
        axes.plot(place, difference, "o", color=ORANGE, markerfacecolor=face, markersize=7, zorder=3)
        ends += [low, high]
        if len(rows) <= _MOST_LABELS:
            pair = [values[name] for name in ("warm start", "SVDecode")]
            pair = [value["mean"] if isinstance(value, dict) else value for value in pair]
            axes.annotate(
                f"{pair[0]:.3f}\n{pair[1]:.3f}", (place, difference), (8, 0), textcoords="offset points",
                fontsize=8, va="center", color="#4a5568", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
    _finish(
        axes, rows, ends, [f"{row['step']}\nmu {row['mu']:.2f}\ncoverage {row['coverage']:.2f}" for row in rows]
    )  # fmt: skip
    axes.set_ylabel(f"change of {label}", fontsize=9)


def _finish(axes: Axes, rows: Sequence[dict], ends: Sequence[float], names: Sequence[str]) -> None:
    """Line at 0, limits that do not magnify noise, and the checkpoints' names below."""
    axes.axhline(0.0, color=GREY, linewidth=1, linestyle="--", zorder=0)
    low, high = min(*ends, -SMALLEST_REACH), max(*ends, SMALLEST_REACH)
    margin = 0.16 * (high - low)  # for the labels
    axes.set_ylim(low - margin, high + margin)
    shown = range(0, len(rows), -(-len(rows) // _MOST_LABELS) or 1)
    axes.set_xticks(list(shown), [names[i] for i in shown], fontsize=8)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("warm-start steps")
    axes.grid(axis="y", alpha=0.25)
