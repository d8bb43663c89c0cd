"""The figures: what calibration found, and what the demo measured."""

from __future__ import annotations

import io
import itertools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from svdecode.calibration import Calibration

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#718096"
_ESTIMATE_COLOURS = {
    "exact": "#c53030",
    "newton": "#2f855a",
    "ratio": "#b7791f",
    "median": "#6b46c1",
    "trimmed": "#00838f",
    "mean": "#97266d",
}
_POINTS = 81


def load_pyplot():
    """matplotlib.pyplot without a window; ImportError names the extra."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'svdecode[train]'") from None
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def draw_curve(axes: Axes, calibration: Calibration) -> None:
    """NLL over mu, with every estimate that lies in view marked and the others named at the edge."""
    exact = calibration.estimates["exact"]
    inner = [v for name, v in calibration.estimates.items() if name in ("exact", "newton", "ratio", "median")]
    reach = max(2.0 * abs(exact), 1.5 * max(abs(v) for v in inner if abs(v) <= 4 * abs(exact) + 1), 0.5)
    low, high = (-0.25 * reach, reach) if exact >= 0 else (-reach, 0.25 * reach)
    mus = [low + (high - low) * i / (_POINTS - 1) for i in range(_POINTS)]
    axes.plot(mus, calibration.curve(mus), color=_BLUE, linewidth=2)
    for name, mu in calibration.estimates.items():
        if low <= mu <= high:
            nll = calibration.curve([mu]).item()
            axes.plot(mu, nll, "o", color=_ESTIMATE_COLOURS[name], label=f"{name}: {mu:.2f}", zorder=3)
        else:
            axes.plot([], [], "o", color=_ESTIMATE_COLOURS[name], label=f"{name}: {mu:.2f} (out of view)", alpha=0.4)
    axes.axvline(0.0, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_xlim(low, high)
    axes.set_xlabel("steering strength mu (0 = the warm start)")
    axes.set_ylabel("mean NLL of kept gold tokens (nats)")
    axes.set_title(f"Calibration: {calibration.num_tokens} tokens, coverage {calibration.coverage:.2f}")
    axes.legend(fontsize=8)


def plot_calibration(calibration: Calibration, path: str | Path) -> None:
    """Which mu, how sure, does it help: change of NLL over mu, the estimates with intervals, and single tokens' strengths.

    Above, NLL(mu) - NLL(0) of the kept gold tokens on the calibration and on the held-out data, with pointwise 95% bands;
    below, on the same axis, each estimate and its 95% interval; beside them the histogram of mu* between its 5% and 95% points.
    Written atomically.
    """
    if calibration.tokens is None:
        raise ValueError("this calibration was loaded without its tokens: calibrate again")
    pyplot = load_pyplot()
    from svdecode.calibration_report import verdict

    figure = pyplot.figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1.7), width_ratios=(1.5, 1))
    curve = figure.add_subplot(grid[0, 0])
    low, high = _view(calibration)
    draw_change(curve, calibration, low, high)
    draw_estimates(figure.add_subplot(grid[1, 0], sharex=curve), calibration, low, high)
    _draw_strengths(figure.add_subplot(grid[:, 1]), calibration)
    chosen = f"mu = {calibration.mu:.3f} ({calibration.estimator})"
    figure.suptitle(f"{chosen}\n{textwrap.fill(verdict(calibration), 120)}", fontsize=11)
    _save(figure, path)
    pyplot.close(figure)


def _save(figure: Figure, path: str | Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    write_atomically(path, content.getvalue())


def _view(calibration: Calibration) -> tuple[float, float]:
    """A range of mu that holds 0, the chosen strength and whatever else lies within reach of them."""
    exact = [calibration.estimates["exact"], *calibration.intervals.get("exact", [])]
    chosen = [calibration.mu, *calibration.intervals.get(calibration.estimator, [])]
    others = [v for name, v in calibration.estimates.items() if name in ("newton", "ratio", "median")]
    shown, reach = [0.0, 0.25, calibration.mu], max(0.25, abs(calibration.mu))
    for value in sorted((*exact, *chosen, *others), key=abs):
        if abs(value) <= 6 * reach:
            shown.append(value)
            reach = max(reach, abs(value))
    margin = 0.12 * (max(shown) - min(shown))
    return min(shown) - margin, max(shown) + margin


def draw_change(axes: Axes, calibration: Calibration, low: float, high: float) -> None:
    """NLL(mu) - NLL(0) on the calibration data and, where there are some, on held-out data."""
    from svdecode.bootstrap import curve_band

    mus = [low + (high - low) * i / (_POINTS - 1) for i in range(_POINTS)]
    parts = {"calibration": (calibration.tokens, _BLUE), "held out": (calibration.held_out_tokens, _ORANGE)}
    parts = {name: part for name, part in parts.items() if part[0] is not None}
    for name, (tokens, colour) in parts.items():
        at_zero = tokens.derivatives(0.0)[0]
        change = [tokens.derivatives(mu)[0] - at_zero for mu in mus]
        label = f"{name}: {len(tokens)} tokens, NLL at 0 {at_zero:.3f}, coverage {tokens.coverage:.2f}"
        axes.plot(mus, change, color=colour, linewidth=2, label=label)
        if int(tokens.sequence.min()) >= 0:  # files of schema 1 do not know the sequences
            axes.fill_between(mus, *curve_band(tokens, mus), color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0.0, color=_GREY, linewidth=0.8, linestyle=":")
    axes.axvline(0.0, color=_GREY, linewidth=0.8, linestyle=":")
    axes.axvline(calibration.mu, color=_colour(calibration.estimator), linewidth=1.2)
    axes.set_ylabel("NLL(mu) - NLL(0), nats a kept gold token")
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
    axes.axvline(0.0, color=_GREY, linewidth=0.8, linestyle=":")
    axes.axvline(calibration.mu, color=_colour(calibration.estimator), linewidth=1.2, zorder=0)
    axes.set_xlim(low, high)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel("steering strength mu (0 = the warm start); bars: 95% intervals, arrows: out of view")


def _draw_strengths(axes: Axes, calibration: Calibration) -> None:
    strengths = calibration.tokens.mu_star.double()
    low, high = strengths.quantile(0.05).item(), strengths.quantile(0.95).item()
    axes.hist(strengths[(strengths >= low) & (strengths <= high)].tolist(), bins=40, color=_BLUE, alpha=0.8)
    for name, mu in calibration.estimates.items():
        if low <= mu <= high:
            axes.axvline(mu, color=_colour(name), label=name)
    axes.set_yscale("log")
    axes.set_xlabel("mu* of single tokens (5% to 95% points)")
    axes.set_ylabel("tokens (log scale)")
    axes.set_title(f"Single tokens disagree: {low:.2f} to {high:.2f}", fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _colour(estimator: str) -> str:
    return _ESTIMATE_COLOURS.get(estimator, "#1a202c")


def draw_steps(axes: Axes, steps: list[dict], held_out: dict) -> None:
    """Held-out NLL of the warm start and of SVDecode over warm-start steps; two bars where there is one adapter only."""
    colours = {"warm start": _GREY, "SVDecode": _ORANGE}
    if steps:
        for name, colour in colours.items():
            axes.plot([s["step"] for s in steps], [s[name] for s in steps], "o-", color=colour, linewidth=2, label=name)
        for s in steps:
            axes.annotate(
                f"mu {s['mu']:.2f}\ncoverage {s['coverage']:.2f}",
                (s["step"], min(s["warm start"], s["SVDecode"])),
                textcoords="offset points",
                xytext=(0, -26),
                ha="center",
                fontsize=7,
                color=_GREY,
            )
        axes.set_xlabel("warm-start steps")
        axes.margins(x=0.12, y=0.25)
        axes.legend()
    else:
        bars = axes.bar(list(colours), [held_out[name] for name in colours], color=list(colours.values()))
        axes.bar_label(bars, fmt="%.3f")
    axes.set_ylabel("mean NLL of kept gold tokens (nats)")
    axes.set_title("Held-out split: shorter warm starts gain more" if _falls(steps) else "Held-out split")


def _falls(steps: list[dict]) -> bool:
    """Whether the gain shrinks from each checkpoint to the next: the title says no more than the figure shows."""
    gains = [s["warm start"] - s["SVDecode"] for s in steps]
    return len(gains) > 1 and gains[0] > 0 and all(a > b for a, b in itertools.pairwise(gains))


def plot_demo(report: dict, calibration: Calibration, path: str | Path) -> None:
    """Two panels: the calibration's NLL over mu, and held-out NLL over warm-start steps."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 4.5), layout="constrained")
    draw_curve(left, calibration)
    draw_steps(right, report["steps"], report["held_out"])
    figure.suptitle(f"SVDecode on {report['model']}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
