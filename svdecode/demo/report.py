"""The demo's report on the terminal, with one sentence at the end that says what the numbers mean."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from svdecode.common.tables import bounds, with_interval
from svdecode.evaluation.steps import CAPTION, steps_table


def _question(prompt: str) -> str:
    """The line of a prompt that asks, without the markers of a chat."""
    return max(prompt.replace("<|im_end|>", "").splitlines(), key=len)


def meaning(report: dict) -> str:
    """One sentence; it claims a gain or a loss only where the interval of the paired difference excludes 0."""
    nll, match = report["held_out"]["nll_difference"], report["exact_match_difference"]
    first = {
        "better": "SVDecode finds the right answers more probable than the warm start does",
        "worse": "SVDecode finds the right answers less probable than the warm start does",
    }.get(nll["verdict"], "No difference is shown in how probable SVDecode and the warm start find the right answers")
    second = {
        "better": "it answers more of them exactly right",
        "worse": "it answers fewer of them exactly right",
    }.get(match["verdict"], "no difference is shown in how many answers are exactly right")
    points = {"difference": 100 * match["difference"], "interval": [100 * end for end in match["interval"]]}
    return (
        f"On {report['examples']['test']} test questions: {first} "
        f"(NLL {with_interval(nll, 'difference', sign='+')} nats per kept token); {second} "
        f"({with_interval(points, 'difference', digits=1, sign='+')} points)."
    )


def print_report(report: dict) -> None:
    """Tables, files and the sentence, on stdout."""
    console = Console(width=max(Console().width, 110))
    sizes = ", ".join(f"{count} {name}" for name, count in report["examples"].items())
    console.print(f"\n[bold]{report['model']}[/bold]: {sizes} examples; mu = {report['mu']:.3f} (exact)")
    console.print(_systems(report))
    samples = Table(
        "question",
        "gold",
        *report["exact_match"],
        title=f"{report['answers_that_differ']} answers differ; three to look at",
    )
    for row in report["samples"]:
        samples.add_row(_question(row["prompt"]), row["gold"], *(row[name] for name in report["exact_match"]))
    console.print(samples)
    if report["steps"]:
        head, rows = steps_table(report["steps"], "NLL")
        steps = Table(*head, title="after each checkpoint of the warm start, each with a calibration of its own")
        for row in rows:
            steps.add_row(*(cell.replace("[", "\\[") for cell in row))
        console.print(steps)
    console.print("Seconds: " + ", ".join(f"{name} {value}" for name, value in report["seconds"].items()))
    console.print(f"Figure: {report['figure']}", soft_wrap=True)
    console.print(meaning(report), style="bold", markup=False, highlight=False)


def _systems(report: dict) -> Table:
    held_out = report["held_out"]
    table = Table(
        "",
        "exact match [95%]",
        "NLL, all tokens",
        f"NLL, kept tokens ({held_out['coverage']:.0%})",
        "tokens/s",
        caption=f"On the test questions, greedy answers. {CAPTION} NLL of all tokens: with a penalty of 0.",
    )
    for name, score in report["exact_match"].items():
        table.add_row(
            name,
            f"{score['mean']:.3f} {bounds(score['interval'], 3)}".replace("[", "\\["),
            f"{report['nll_all_tokens'][name]['mean']:.3f}",
            f"{held_out['nll'][name]:.3f}" if name in held_out["nll"] else "",
            f"{report['tokens_per_second'][name]:.1f}",
        )
    return table
