"""The demo's figure: the calibrated strength on held-out text, the gain over warm-start steps, and the answers."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.common.figures import load_pyplot, save_figure
from svdecode.evaluation.figures import draw_change_over_steps, draw_values
from svdecode.evaluation.steps import CAPTION
from svdecode.strength.figure import draw_change, view

if TYPE_CHECKING:
    from svdecode.strength.calibration import Calibration


def plot_demo(report: dict, calibration: Calibration, path: str | Path) -> None:
    """Three panels: change of NLL over mu, change of NLL after each checkpoint, and exact match; all with 95% intervals.

    Args:
        report: of `svdecode.demo.run.run`.
        calibration: made with held-out data.
        path: the file, in the format of its ending.
    """
    pyplot = load_pyplot()
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(15, 5.2), layout="constrained", width_ratios=(1.2, 1.2, 1)
    )
    low, high = view(calibration)
    draw_change(left, calibration, low, high)
    left.set_xlim(low, high)
    left.tick_params(labelbottom=True)
    left.set_xlabel(f"steering strength mu (0 = the warm start; line: the calibrated {calibration.mu:.2f})")

    rows = report["steps"] or [{"step": "this adapter", "mu": report["mu"], **report["held_out"]}]
    draw_change_over_steps(middle, rows, "nll", "NLL, nats per kept gold token")
    middle.set_title(
        f"Does it help{' after each checkpoint' if report['steps'] else ''}? Below 0 it does\n"
        "(hollow: the interval contains 0; numbers: warm start, SVDecode)",
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
    right.set_title(f"Does it answer better than the warm start?\n{points}", fontsize=10)
    figure.suptitle(f"SVDecode on {report['model']}, {report['examples']['test']} test questions", fontsize=12)
    figure.supxlabel(textwrap.fill(f"All intervals are of 95%. {CAPTION}", 170), fontsize=8.5)
    save_figure(figure, path)
