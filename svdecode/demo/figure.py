"""The demo's figure: the strength in both directions on held-out text, what each checkpoint gains, and the answers."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.common.figures import BLUE, GREY, ORANGE, load_pyplot, save_figure
from svdecode.constants import KL, LOG_RATIO
from svdecode.evaluation.figures import SMALLEST_REACH, draw_values, ends_of
from svdecode.evaluation.steps_figure import draw_ways_over_steps
from svdecode.evaluation.steps_report import WORTH_CAPTION
from svdecode.strength.fair_table import temperature_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = {KL: (BLUE, "-", "s"), LOG_RATIO: (ORANGE, "--", "o")}
_FAR_APART = 3.0  # bests whose scales differ more than so share no linear axis


def plot_demo(report: dict, path: str | Path) -> None:
    """Three panels: change of NLL over mu, change of NLL after each checkpoint, and exact match; all with 95% intervals.

    Args:
        report: of `svdecode.demo.run.run`.
        path: the file, in the format of its ending.
    """
    pyplot = load_pyplot()
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(15.5, 5.6), layout="constrained", width_ratios=(1.2, 1.3, 1)
    )
    draw_directions(left, report["curves"], report["temperature"])
    left.set_title("Does steering help this adapter? Below 0 it does\n(test questions, whole vocabulary)", fontsize=10)

    rows = report["steps"] or [{"step": "this adapter", "best": report["best"], "temperature": report["temperature"]}]
    draw_ways_over_steps(middle, rows, worth=bool(report["steps"]))
    middle.set_title(
        f"Does it help{' after each checkpoint' if report['steps'] else ''}? Below 0 it does\n"
        "(hollow: the interval contains 0)",
        fontsize=10,
    )
    if not report["steps"]:
        middle.set_xlabel("")

    found = report["exact_match"]
    draw_values(right, list(found), found)
    right.set_yticks(range(len(found)), list(found))
    right.set_ylim(len(found) - 0.5, -0.5)
    right.set_xlim(left=-0.04 * right.get_xlim()[1])  # a point at 0 is seen whole
    right.set_xlabel("share of test questions answered exactly right")
    change = report["exact_match_difference"]
    ends = ", ".join(f"{100 * end:+.1f}" for end in change["interval"] or ()) or "no interval"
    points = f"{100 * change['difference']:+.1f} points [{ends}]"
    right.set_title(f"Does it answer better than the warm start?\n{points}, the paper's setting", fontsize=10)
    figure.suptitle(f"SVDecode on {report['model']}, {report['examples']['test']} test questions", fontsize=12)
    figure.supxlabel(textwrap.fill(f"All intervals are of 95%. {WORTH_CAPTION}", 175), fontsize=8.5)
    save_figure(figure, path)


def draw_directions(axes: Axes, curves: dict[str, dict], temperature: dict) -> None:
    """The change of NLL over mu in each direction, with pointwise bands, and the best temperature's as a line across.

    Args:
        axes: where to draw; its mu is on a symmetric log scale where the directions' best strengths lie far apart.
        curves: of `svdecode.demo.curves.direction_curves`.
        temperature: its row of the fair table.
    """
    low, high = (-end for end in reversed(ends_of(temperature, "gain")))
    at = -temperature["gain"]
    shown = [0.0, low, high, at]
    scales = [max(map(abs, curve["mus"])) for curve in curves.values()]
    if max(scales) > _FAR_APART * min(scales):
        axes.set_xscale("symlog", linthresh=min(scales) / 3, linscale=0.7)
    for direction, curve in curves.items():
        colour, dashes, marker = _STYLES[direction]
        band = [[float(value) for value in curve[end]] for end in ("low", "high")]  # "nan" in a file
        axes.plot(curve["mus"], curve["change"], color=colour, linestyle=dashes, linewidth=2)
        axes.fill_between(curve["mus"], *band, color=colour, alpha=0.15, linewidth=0)
        place = min(range(len(curve["mus"])), key=lambda i: abs(curve["mus"][i] - curve["mu"]))
        mu, change = curve["mus"][place], curve["change"][place]
        axes.plot(
            mu, change, marker, color=colour, markersize=8, zorder=4, label=f"{direction}, best mu {curve['mu']:.2f}"
        )
        axes.annotate(
            direction, (mu, change), (0, -12), textcoords="offset points", ha="center", va="top", fontsize=9,
            color=colour, fontweight="bold",
        )  # fmt: skip
        shown += [change, *(end[place] for end in band)]
    axes.axhspan(low, high, facecolor="none", edgecolor=GREY, hatch="////", linewidth=0.5, alpha=0.5, zorder=0)
    label = f"best temperature, {temperature_label(temperature)}"
    axes.axhline(at, color="black", linestyle="-.", linewidth=1.5, label=label)
    axes.axhline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.axvline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    # What lies far above 0 is only more of the same: the panel shows where it helps.
    shown = [value for value in shown if not math.isnan(value)]
    reach = max(max(shown) - min(shown), SMALLEST_REACH)
    axes.set_ylim(min(shown) - 0.25 * reach, max(shown) + 0.6 * reach)
    axes.set_xlim(min(c["mus"][0] for c in curves.values()), max(c["mus"][-1] for c in curves.values()))
    axes.set_xlabel("steering strength mu (0 = the warm start)\nmark: the best on the calibration data")
    axes.set_ylabel("NLL(mu) - NLL(0), nats per gold token")
    axes.legend(fontsize=8, loc="upper right")
