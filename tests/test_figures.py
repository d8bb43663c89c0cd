"""The figures of an evaluation: what is drawn where, hollow or filled, and what lies out of view."""

from __future__ import annotations

import math

import pytest

from svdecode.common.figures import load_pyplot
from svdecode.demo.figure import draw_directions
from svdecode.evaluation.figures import SMALLEST_REACH, draw_differences, plot_report
from svdecode.evaluation.report import Report
from svdecode.evaluation.steps_figure import draw_change_over_steps, draw_ways_over_steps, draw_worth, plot_steps
from svdecode.evaluation.steps_report import steps_markdown, worth_sentences

NAMES = ["pre-trained", "warm start", "SVDecode (exact)", "no confidence mask"]


def difference(value, low, high):
    return {"difference": value, "interval": [low, high], "verdict": ""}


@pytest.fixture
def axes():
    figure, axes = load_pyplot().subplots()
    yield axes
    load_pyplot().close(figure)


def points(axes) -> dict[float, tuple[str, float, bool]]:
    """height -> (marker, place, hollow) of what is drawn as a point."""
    found = {}
    for line in axes.lines:
        if line.get_marker() not in ("None", "_"):
            (x,), (y,) = line.get_xdata(), line.get_ydata()
            found[y] = (line.get_marker(), x, line.get_markerfacecolor() == "white")
    return found


def test_points_are_hollow_where_no_difference_is_shown_and_outliers_are_arrows(axes):
    found = {
        "pre-trained": difference(-6.9, -7.2, -6.5),
        "SVDecode (exact)": difference(0.05, 0.02, 0.09),
        "no confidence mask": difference(0.01, -0.03, 0.04),
    }
    values = {name: {"mean": 0.5 + row} for row, name in enumerate(NAMES)}
    draw_differences(axes, NAMES, found, values)
    low, high = axes.get_xlim()
    assert -0.1 < low < -0.03
    assert 0.09 < high < 0.2
    drawn = points(axes)
    assert drawn[0] == ("<", low, False)  # the arrow, with its number beside it
    assert [text.get_text() for text in axes.texts] == ["-6.9"]
    assert drawn[1] == ("s", 0.0, False)  # what the others are compared with
    assert drawn[2] == ("o", 0.05, False)
    assert drawn[3] == ("D", 0.01, True)
    right = next(other for other in axes.figure.axes if other is not axes)
    assert [label.get_text() for label in right.get_yticklabels()] == ["0.500", "1.500", "2.500", "3.500"]


def test_an_axis_does_not_magnify_noise(axes):
    draw_differences(axes, NAMES, {"SVDecode (exact)": difference(1e-7, -1e-7, 2e-7)}, {})
    assert axes.get_xlim()[0] <= -SMALLEST_REACH
    assert axes.get_xlim()[1] >= SMALLEST_REACH


def steps(*differences):
    return [
        {
            "step": 8 * 2**i, "mu": 1.0, "coverage": 0.5, "nll": {"warm start": 1.0, "SVDecode": 1.0 + one["difference"]},
            "nll_difference": {"verdict": "", **one}, "metric": {}, "metric_difference": {},
            "warm_start": {"nll": 3.0 - i}, "temperature": way(0.1, 0.05, -0.2), "best": way(-one["difference"], 0.1, 0.8),
            "worth": {"steps": [12.0, math.inf][i % 2], "interval": [9.0, math.inf], "text": "12.0 [9.0, more than 16]"},
        }
        for i, one in enumerate(differences)
    ]  # fmt: skip


def way(gain, reach, mu):
    """A row of the fair table."""
    over = {"gain": gain - 0.05, "interval": [gain - 0.05 - reach, gain - 0.05 + reach]}
    return {
        "name": "log_ratio, whole vocabulary", "direction": "log_ratio", "mu": mu, "nll": 2.5, "gain": gain,
        "interval": [gain - reach, gain + reach], "over_temperature": over,
    }  # fmt: skip


def test_each_checkpoint_has_a_whisker(axes):
    rows = steps(difference(-0.2, -0.3, -0.1), difference(0.001, -0.002, 0.004))
    draw_change_over_steps(axes, rows, "nll", "NLL")
    whiskers = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "_"]
    assert whiskers == [[-0.3, -0.1], [-0.002, 0.004]]
    hollow = [line.get_markerfacecolor() == "white" for line in axes.lines if line.get_marker() == "o"]
    assert hollow == [False, True]
    assert [text.get_text() for text in axes.texts] == ["1.000\n0.800", "1.000\n1.001"]
    assert axes.get_ylim()[1] >= SMALLEST_REACH
    assert axes.get_xticklabels()[0].get_text() == "8\nmu 1.00\ncoverage 0.50"


def test_one_sequence_has_no_interval_and_many_checkpoints_have_room(axes, tmp_path):
    draw_change_over_steps(axes, steps(*[{"difference": 0.1, "interval": None}] * 30), "nll", "NLL")
    assert len(axes.get_xticks()) <= 12
    assert not axes.texts
    plot_steps(steps(difference(0.1, 0.0, 0.2)), "MC1", "truthfulqa_mc", tmp_path / "steps.png")  # nothing was judged
    assert (tmp_path / "steps.png").exists()


def test_ways_over_steps_are_told_apart_without_colours(axes):
    rows = steps(difference(-0.6, -0.7, -0.5), difference(-0.02, -0.1, 0.1))
    draw_ways_over_steps(axes, rows, worth=True)
    drawn = {
        (line.get_marker(), round(line.get_ydata()[0], 6)): line for line in axes.lines if len(line.get_xdata()) == 1
    }
    assert drawn["o", -0.6].get_markerfacecolor() != "white"
    assert drawn["o", -0.02].get_markerfacecolor() == "white"  # the interval [-0.08, 0.12] contains 0
    assert drawn["D", -0.1].get_markerfacecolor() != "white"
    assert {line.get_linestyle() for line in axes.lines if line.get_marker() == "_"} == {"-", "--"}
    assert axes.get_xticklabels()[0].get_text() == "8\nworth 12.0\n[9.0, more than 16]"
    assert {"log_ratio\nmu 0.80", "T = 1.25"} == {text.get_text() for text in axes.texts}


def test_worth_beyond_the_checkpoints_is_an_arrow_at_the_edge(axes):
    draw_worth(axes, steps(difference(-0.6, -0.7, -0.5), difference(-0.5, -0.6, -0.4)))
    high = axes.get_xlim()[1]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == ">"] == pytest.approx([high] * 3)
    dotted = [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted[0] == pytest.approx([math.log1p(8), math.log1p(12)])
    assert dotted[1] == pytest.approx([math.log1p(16), high])


def test_words_about_worth():
    rows = steps(difference(-0.6, -0.7, -0.5), difference(-0.02, -0.1, 0.1))
    first, second = worth_sentences(rows)
    assert (
        first
        == "After 8 steps, steered with log_ratio, mu 0.80: the NLL of 12.0 [9.0, more than 16] steps of the warm start alone."
    )
    assert second == "After 16 steps steering (log_ratio, mu 0.80) is not shown to gain over the warm start alone."
    page = steps_markdown(rows, "nll", "NLL")
    assert all(sentence in page for sentence in (first, second))


def test_both_directions_and_the_temperature(axes):
    curves = {
        name: {
            "mu": mu,
            "mus": [-1.0, 0.0, mu],
            "change": [0.3, 0.0, low],
            "low": [0.2, 0.0, low - 0.1],
            "high": [0.4, 0.0, low + 0.1],
        }
        for name, mu, low in (("kl", 5.0, -0.27), ("log_ratio", 1.2, -1.13))
    }
    draw_directions(axes, curves, way(0.17, 0.04, -0.2))
    labels = axes.get_legend_handles_labels()[1]
    assert "kl, best mu 5.00" in labels
    assert "log_ratio, best mu 1.20" in labels
    assert "best temperature, T = 1.25" in labels
    level = next(line for line in axes.lines if line.get_label().startswith("best temperature"))
    assert set(level.get_ydata()) == {-0.17}
    assert axes.get_ylim()[0] < -1.13


@pytest.mark.parametrize("judged", [True, False])
def test_a_model_alone_and_answers_without_verdicts(judged, tmp_path):
    results = {"true": {"pre-trained": {"mean": 0.3, "interval": [0.2, 0.4]}}} if judged else {}
    report = Report("truthfulqa_gen", "tiny", 9, {"pre-trained": {}}, results, {}, None)
    plot_report(report, tmp_path / "results.png")
    assert (tmp_path / "results.png").exists()
