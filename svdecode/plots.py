"""The figures: what calibration found, and what the demo measured."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'svdecode[demo]'") from None
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
    """Two panels: `draw_curve`, and the histogram of the tokens' own strengths between their 5% and 95% points."""
    if calibration.tokens is None:
        raise ValueError("this calibration was loaded without its tokens: calibrate again")
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw_curve(left, calibration)
    strengths = calibration.tokens.mu_star.double()
    low, high = strengths.quantile(0.05).item(), strengths.quantile(0.95).item()
    shown = strengths[(strengths >= low) & (strengths <= high)]
    right.hist(shown.tolist(), bins=40, color=_BLUE, alpha=0.8)
    for name, mu in calibration.estimates.items():
        if low <= mu <= high:
            right.axvline(mu, color=_ESTIMATE_COLOURS[name], label=name)
    right.set_xlabel("optimal strength of single tokens, mu* (5% to 95% points)")
    right.set_ylabel("tokens")
    right.set_title("Single tokens disagree: mu* is heavy-tailed")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


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
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 4.5), layout="constrained")
    draw_curve(left, calibration)
    draw_steps(right, report["steps"], report["held_out"])
    figure.suptitle(f"SVDecode on {report['model']}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
