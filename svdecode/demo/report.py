"""The demo's report on the terminal, with one sentence that says what the numbers mean."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

MODELS = ("pre-trained", "warm start", "SVDecode")


def _question(prompt: str) -> str:
    """The line of a prompt that asks, without the markers of a chat."""
    return max(prompt.replace("<|im_end|>", "").splitlines(), key=len)


def meaning(report: dict) -> str:
    """One sentence; it claims a gain only where the interval of the paired difference excludes 0."""
    held_out, accuracy = report["held_out"], report["exact_match_difference"]
    low, high = held_out["interval"]
    size = f"{held_out['difference']:+.3f} nats a token [{low:+.3f}, {high:+.3f}]"
    if high < 0:
        nll = f"SVDecode lowers the held-out NLL of kept gold tokens ({size})"
    elif low > 0:
        nll = f"SVDecode raises the held-out NLL of kept gold tokens ({size}): the warm start alone is better here"
    else:
        nll = f"SVDecode does not change the held-out NLL of kept gold tokens beyond noise ({size})"
    low, high = accuracy["interval"]
    change = f"{100 * accuracy['difference']:+.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
    beyond = "changes" if low > 0 or high < 0 else "does not change beyond noise"
    return f"{nll}; exact match {beyond} ({change})."


def print_report(report: dict) -> None:
    """Tables and the sentence, on stdout."""
    console = Console(width=max(Console().width, 100))
    sizes = ", ".join(f"{count} {name}" for name, count in report["examples"].items())
    console.print(f"\n[bold]{report['model']}[/bold]: {sizes} examples; mu = {report['mu']:.3f} (exact)")
    held_out = report["held_out"]
    table = Table(
        "",
        "exact match [95%]",
        "NLL, all gold tokens",
        f"NLL, kept gold tokens ({held_out['coverage']:.0%})",
        "tokens/s",
        caption="NLL in nats a token on the test split; SVDecode over all tokens with penalty 0, over kept tokens with -inf",
    )
    for name in MODELS:
        score = report["exact_match"][name]
        low, high = score["interval"]
        table.add_row(
            name,
            f"{score['accuracy']:.3f} [{low:.3f}, {high:.3f}]",
            f"{report['nll_all_tokens'][name]:.3f}",
            f"{held_out[name]:.3f}" if name in held_out else "",
            f"{report['tokens_per_second'][name]:.1f}",
        )
    console.print(table)
    samples = Table(
        "question", "gold", *MODELS, title=f"{report['answers_that_differ']} answers differ; three to look at"
    )
    for row in report["samples"]:
        samples.add_row(_question(row["prompt"]), row["gold"], *(row[name] for name in MODELS))
    console.print(samples)
    if report["steps"]:
        steps = Table("warm-start steps", "coverage", "mu", "warm start NLL", "SVDecode NLL", "difference [95%]")
        for row in report["steps"]:
            low, high = row["interval"]
            steps.add_row(
                str(row["step"]),
                f"{row['coverage']:.2f}",
                f"{row['mu']:.2f}",
                f"{row['warm start']:.3f}",
                f"{row['SVDecode']:.3f}",
                f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]",
            )
        console.print(steps)
    console.print(f"[bold]{meaning(report)}[/bold]")
    console.print("Seconds: " + ", ".join(f"{name} {value}" for name, value in report["seconds"].items()))
    console.print(f"Figure: {report['figure']}")
