"""The figure of a calibration: which mu, how sure, does it help."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.common.figures import BLUE, GREY, ORANGE, figure_format, load_pyplot, save_figure
from svdecode.strength.bootstrap import curve_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from svdecode.strength.calibration import Calibration

_ESTIMATE_COLOURS = {
    "exact": "#c53030",
    "newton": "#2f855a",
    "ratio": "#b7791f",
    "median": "#6b46c1",
    "trimmed": "#00838f",
    "mean": "#97266d",
}
_DASHES = ("-", "--", "-.", ":", (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2)), (0, (8, 4)))
_POINTS = 81
_RUNAWAY = 50.0


def plot_calibration(calibration: Calibration, path: str | Path | None = None) -> Figure:
    """Which mu, how sure, does it help: change of NLL over mu, the estimates with intervals, and single tokens' strengths.

    Above, NLL(mu) - NLL(0) of the kept gold tokens on the calibration and on the held-out data, with pointwise 95% bands;
    below, on the same axis, each estimate and its 95% interval; beside them the histogram of mu* between its 5% and 95% points.

    Args:
        calibration: with its tokens, as `svdecode.calibrate` returns it.
        path: a file to write, atomically, in the format of its ending (.png, .svg, .pdf); None writes nothing.

    Returns:
        The figure, which a notebook shows.

    Raises:
        ValueError: a calibration without its tokens, or an unknown ending.
        ImportError: matplotlib is missing.
    """
    if calibration.tokens is None:
        raise ValueError("this calibration was loaded without its tokens: calibrate again")
    pyplot = load_pyplot()
    if path is not None:
        figure_format(path)
    figure = pyplot.figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1.7), width_ratios=(1.5, 1))
    curve = figure.add_subplot(grid[0, 0])
    low, high = view(calibration)
    draw_change(curve, calibration, low, high)
    draw_estimates(figure.add_subplot(grid[1, 0], sharex=curve), calibration, low, high)
    _draw_strengths(figure.add_subplot(grid[:, 1]), calibration)
    chosen = f"mu = {calibration.mu:.3f} ({calibration.estimator})"
    figure.suptitle(f"{chosen}\n{textwrap.fill(calibration.verdict(), 120)}", fontsize=11)
    if path is not None:
        save_figure(figure, path)
    else:
        pyplot.close(figure)  # a notebook shows what is returned, and not a second time what pyplot holds
    return figure


def view(calibration: Calibration) -> tuple[float, float]:
    """A range of mu that holds 0, the chosen strength and whatever else lies within reach of them."""
    exact = [calibration.estimates["exact"], *calibration.intervals.get("exact", [])]
    chosen = [calibration.mu, *calibration.intervals.get(calibration.estimator, [])]
    others = [v for name, v in calibration.estimates.items() if name in ("newton", "ratio", "median")]
    # A selected strength of 0 says nothing of the scale: the exact one does, unless the search has run away.
    reach = max(0.25, abs(calibration.mu) or min(abs(exact[0]), _RUNAWAY))
    shown = [0.0, 0.25, calibration.mu]
    for value in sorted((*exact, *chosen, *others), key=abs):
        if abs(value) <= 6 * reach:
            shown.append(value)
            reach = max(reach, abs(value))
    margin = 0.12 * (max(shown) - min(shown))
    return min(shown) - margin, max(shown) + margin


def draw_change(axes: Axes, calibration: Calibration, low: float, high: float) -> None:
    """NLL(mu) - NLL(0) on the calibration data and, where there are some, on held-out data."""
    mus = [low + (high - low) * i / (_POINTS - 1) for i in range(_POINTS)]
    parts = {"calibration": (calibration.tokens, BLUE, "-"), "held out": (calibration.held_out_tokens, ORANGE, "--")}
    for name, (tokens, colour, dashes) in parts.items():
        if tokens is None:
            continue
        curve = tokens.curve
        at_zero = curve.mean(0.0)
        change = [curve.mean(mu) - at_zero for mu in mus]
        label = f"{name}: {len(tokens)} tokens, {curve.coverage:.0%} scored, NLL at 0 {at_zero:.3f}"
        axes.plot(mus, change, color=colour, linestyle=dashes, linewidth=2, label=label)
        low_band, high_band = curve_band(curve, mus).tolist()
        axes.fill_between(mus, low_band, high_band, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.axvline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.axvline(calibration.mu, color=_colour(calibration.estimator), linewidth=1.2)
    axes.set_ylabel("NLL(mu) - NLL(0), nats per scored gold token")
    axes.set_title("Does it help? Below 0 it does (bands: 95%, pointwise)", fontsize=10)
    axes.tick_params(labelbottom=False)
    axes.legend(fontsize=8, loc="best")


def draw_estimates(axes: Axes, calibration: Calibration, low: float, high: float) -> None:
    """Each estimate with its 95% interval, one line each; what lies out of view is an arrow at the edge."""
    names = list(calibration.estimates)
    for height, name in enumerate(reversed(names)):
        mu, ends, colour = calibration.estimates[name], calibration.intervals.get(name), _colour(name)
        if ends is not None:
            axes.plot([max(ends[0], low), min(ends[1], high)], [height, height], color=colour, linewidth=2.5, alpha=0.5)
            for edge, marker, out in ((low, "<", ends[0] < low), (high, ">", ends[1] > high)):
                if out:
                    axes.plot(edge, height, marker, color=colour, markersize=5, clip_on=False)
        if low <= mu <= high:
            axes.plot(mu, height, "o", color=colour, markersize=8 if name == calibration.estimator else 5, zorder=3)
        else:
            axes.plot(low if mu < low else high, height, "<" if mu < low else ">", color=colour, clip_on=False)
    labels = []
    for name in reversed(names):
        ends = calibration.intervals.get(name)
        labels.append(
            f"{name} {calibration.estimates[name]:.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
        )
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    for label, name in zip(axes.get_yticklabels(), reversed(names), strict=True):
        label.set_fontweight("bold" if name == calibration.estimator else "normal")
    axes.axvline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.axvline(calibration.mu, color=_colour(calibration.estimator), linewidth=1.2, zorder=0)
    axes.set_xlim(low, high)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel("steering strength mu (0 = the warm start); bars: 95% intervals, arrows: out of view")


def _draw_strengths(axes: Axes, calibration: Calibration) -> None:
    assert calibration.tokens is not None  # plot_calibration has checked
    strengths = calibration.tokens.gold.mu_star.double()
    low, high = strengths.quantile(0.05).item(), strengths.quantile(0.95).item()
    axes.hist(strengths[(strengths >= low) & (strengths <= high)].tolist(), bins=40, color=BLUE, alpha=0.8)
    shown = {name: mu for name, mu in calibration.estimates.items() if low <= mu <= high}
    # Told apart without colours too: each line has dashes of its own.
    for index, (name, mu) in enumerate(shown.items()):
        axes.axvline(
            mu, color=_colour(name), linestyle=_DASHES[index % len(_DASHES)], linewidth=1.6, label=f"{name} {mu:.2f}"
        )
    axes.set_yscale("log")
    axes.set_xlabel("mu* of single tokens (5% to 95% points)")
    axes.set_ylabel("tokens (log scale)")
    axes.set_title(f"Single tokens disagree: {low:.2f} to {high:.2f}", fontsize=10)
    if shown:
        axes.legend(fontsize=8)


def _colour(estimator: str) -> str:
    return _ESTIMATE_COLOURS.get(estimator, "#1a202c")
