"""The demo's figure."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.common.figures import BLUE, GREY, ORANGE, load_pyplot
from svdecode.strength.figure import _ESTIMATE_COLOURS, _POINTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from svdecode.strength.calibration import Calibration


def draw_curve(axes: Axes, calibration: Calibration) -> None:
    """NLL over mu, with every estimate that lies in view marked and the others named at the edge."""
    exact = calibration.estimates["exact"]
    inner = [v for name, v in calibration.estimates.items() if name in ("exact", "newton", "ratio", "median")]
    reach = max(2.0 * abs(exact), 1.5 * max(abs(v) for v in inner if abs(v) <= 4 * abs(exact) + 1), 0.5)
    low, high = (-0.25 * reach, reach) if exact >= 0 else (-reach, 0.25 * reach)
    mus = [low + (high - low) * i / (_POINTS - 1) for i in range(_POINTS)]
    axes.plot(mus, calibration.curve(mus), color=BLUE, linewidth=2)
    for name, mu in calibration.estimates.items():
        if low <= mu <= high:
            nll = calibration.curve([mu]).item()
            axes.plot(mu, nll, "o", color=_ESTIMATE_COLOURS[name], label=f"{name}: {mu:.2f}", zorder=3)
        else:
            axes.plot([], [], "o", color=_ESTIMATE_COLOURS[name], label=f"{name}: {mu:.2f} (out of view)", alpha=0.4)
    axes.axvline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlim(low, high)
    axes.set_xlabel("steering strength mu (0 = the warm start)")
    axes.set_ylabel("mean NLL of kept gold tokens (nats)")
    axes.set_title(f"Calibration: {calibration.num_tokens} tokens, coverage {calibration.coverage:.2f}")
    axes.legend(fontsize=8)


def draw_steps(axes: Axes, steps: list[dict], held_out: dict) -> None:
    """Held-out NLL of the warm start and of SVDecode over warm-start steps; two bars where there is one adapter only."""
    colours = {"warm start": GREY, "SVDecode": ORANGE}
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
                color=GREY,
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
