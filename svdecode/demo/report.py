"""The demo's report on the terminal, with one sentence at the end that says what the numbers mean."""

from __future__ import annotations

from svdecode.common.tables import with_interval
from svdecode.common.terminal import print_table
from svdecode.evaluation.steps_report import CAPTION, WORTH_CAPTION, steps_tables, worth_sentences
from svdecode.strength.fair_table import CAPTION as FAIR_CAPTION
from svdecode.strength.fair_table import TITLE, table_cells


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
    ends = None if match["interval"] is None else [100 * end for end in match["interval"]]
    points = {"difference": 100 * match["difference"], "interval": ends}
    return (
        f"On {report['examples']['test']} test questions: {first} "
        f"(NLL {with_interval(nll, 'difference', sign='+')} nats per kept token); {second} "
        f"({with_interval(points, 'difference', digits=1, sign='+')} points)."
    )


def print_report(report: dict) -> None:
    """Tables, files and the sentence, on stdout."""
    sizes = ", ".join(f"{count} {name}" for name, count in report["examples"].items())
    print(f"\n{report['model']}: {sizes} examples; mu = {report['mu']:.3f} (exact)")
    held_out, names = report["held_out"], list(report["exact_match"])
    kept = f"NLL, kept tokens ({held_out['coverage']:.0%})"
    rows = [
        [
            name,
            with_interval(score, "mean"),
            f"{report['nll_all_tokens'][name]['mean']:.3f}",
            f"{held_out['nll'][name]:.3f}" if name in held_out["nll"] else "",
            f"{report['tokens_per_second'][name]:.1f}",
        ]
        for name, score in report["exact_match"].items()
    ]
    print_table(
        "on the test questions, greedy answers", ["", "exact match [95%]", "NLL, all tokens", kept, "tokens/s"], rows
    )
    print(f"{CAPTION} NLL of all tokens: with a penalty of 0.\n")
    samples = [[_question(row["prompt"]), row["gold"], *(row[name] for name in names)] for row in report["samples"]]
    head = ["question", "gold", *names]
    print_table(f"{report['answers_that_differ']} answers differ; three to look at", head, samples, words=head)
    print_table(TITLE, *table_cells(report["table"]), words=())
    print(f"{FAIR_CAPTION}\n{report['recommendation']['text']}\n")
    if report["steps"]:
        for title, head, lines in steps_tables(report["steps"], "NLL")[:2]:
            print_table(f"after each checkpoint: {title}", head, lines)
        print("\n".join([WORTH_CAPTION, *worth_sentences(report["steps"]), ""]))
    print("Seconds: " + ", ".join(f"{name} {value}" for name, value in report["seconds"].items()))
    print(f"Figure: {report['figure']}")
    print(meaning(report), flush=True)
