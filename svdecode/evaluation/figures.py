"""The figures of an evaluation: every system's figure with its interval, and the gain over warm-start steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.common.figures import BLUE, GREY, ORANGE, load_pyplot, save_figure

if TYPE_CHECKING:
    from svdecode.evaluation.report import Report


def plot_report(report: Report, path: str | Path) -> None:
    """A panel a metric: the systems one below the other, a dot and a 95% whisker each, a line at the baseline."""
    pyplot = load_pyplot()
    metrics = list(report.results) or [""]
    names = list(report.systems)
    figure, panels = pyplot.subplots(
        1, len(metrics), figsize=(3.2 + 3.2 * len(metrics), 1.6 + 0.32 * len(names)),
        layout="constrained", sharey=True, squeeze=False,
    )  # fmt: skip
    for metric, axes in zip(metrics, panels[0], strict=True):
        found = report.results.get(metric, {})
        for row, name in enumerate(names):
            if name in found:
                _draw(axes, row, found[name], _colour(name))
        if report.baseline in found:
            axes.axvline(found[report.baseline]["mean"], color=GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel(f"{metric} (95% interval)" if metric else "no answer has a verdict")
        axes.grid(axis="x", alpha=0.25)
        axes.margins(y=0.08)
    panels[0][0].invert_yaxis()  # shared: once turns all panels
    figure.suptitle(f"{report.task}: {report.model}, {report.questions} questions", fontsize=11)
    save_figure(figure, path)


def plot_steps(rows: list[dict], metric: str, task: str, path: str | Path) -> None:
    """Two panels over warm-start steps: NLL of kept gold tokens, and the task's metric; warm start against SVDecode."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    steps = [row["step"] for row in rows]
    for offset, (name, colour) in enumerate((("warm start", GREY), ("SVDecode", ORANGE))):
        left.plot(steps, [row["nll"][name] for row in rows], "o-", color=colour, linewidth=2, label=name)
        means = [row["metric"][name]["mean"] for row in rows]
        spans = [row["metric"][name]["interval"] for row in rows]
        reach = [[max(m - s[0], 0) for m, s in zip(means, spans, strict=True)],
                 [max(s[1] - m, 0) for m, s in zip(means, spans, strict=True)]]  # fmt: skip
        shift = 0.006 * (max(steps) - min(steps)) * (2 * offset - 1)  # whiskers side by side, not on one another
        right.errorbar([s + shift for s in steps], means, yerr=reach, fmt="o-", color=colour, capsize=3, label=name)
    for row in rows:
        left.annotate(
            f"mu {row['mu']:.2f}\ncoverage {row['coverage']:.2f}",
            (row["step"], min(row["nll"]["warm start"], row["nll"]["SVDecode"])),
            textcoords="offset points", xytext=(0, -26), ha="center", fontsize=7, color=GREY,
        )  # fmt: skip
    left.margins(x=0.12, y=0.3)
    left.set_ylabel("mean NLL of kept gold tokens (nats)")
    right.set_ylabel(f"{metric} (95% interval)")
    for axes in (left, right):
        axes.set_xlabel("warm-start steps")
        axes.legend()
    figure.suptitle(f"{task}: gain over warm-start steps, test questions", fontsize=11)
    save_figure(figure, path)


def _draw(axes, row: int, found: dict, colour: str) -> None:
    low, high = found["interval"]
    axes.plot([low, high], [row, row], color=colour, linewidth=2)
    axes.plot(found["mean"], row, "o", color=colour, markersize=5)


def _colour(name: str) -> str:
    return ORANGE if name.startswith("SVDecode") else GREY if name.startswith(("pre-trained", "warm")) else BLUE
