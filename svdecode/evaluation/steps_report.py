"""What the checkpoints of a warm start gain, as tables and sentences."""

from __future__ import annotations

from svdecode.common.tables import markdown_table, with_interval
from svdecode.strength.family import temperature_of

CAPTION = (
    "Kept gold tokens: the tokens of the right answers that the warm start finds at least alpha times (by default a tenth) as "
    "probable as its likeliest token; by default steering chooses no others. Coverage: their share of all tokens of the right "
    "answers. NLL: mean of minus the log-probability, nats per token; lower is better. Kept NLL: that of kept gold tokens."
)
"""What the words of the table of the paper's setting mean."""

WORTH_CAPTION = (
    "All tokens of the right answers, whole vocabulary (alpha 0). Best way: the direction with the lower NLL, at the strength "
    "that is best on the calibration data. Worth: the fewest steps after which the warm start alone has the NLL that this "
    "checkpoint has when it is steered so, read off the warm start's own NLL (linear in log(1 + steps) between checkpoints, "
    "and not continued beyond them)."
)
"""What the words of the table of worths mean."""

Table = tuple[str, list[str], list[list[str]]]


def steps_tables(rows: list[dict], metric: str) -> list[Table]:
    """(title, head, rows) of the tables, which are together too wide for a terminal."""
    head, lines = steps_table(rows, metric)
    return [
        ("all tokens, whole vocabulary: the best way, and what it is worth", *worth_table(rows)),
        ("kept tokens, the paper's setting", head[:6], [line[:6] for line in lines]),
        (f"{metric}, the paper's setting", head[:1] + head[6:], [line[:1] + line[6:] for line in lines]),
    ]


def worth_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the best way of decoding each checkpoint, against its best temperature, and its worth in steps."""
    head = ["steps", "NLL", "best way", "NLL then", "gain [95%]", "temperature", "its gain [95%]",
            "over the temperature [95%]", "worth in steps [95%]"]  # fmt: skip
    lines = []
    for row in rows:
        best, temperature = row["best"], row["temperature"]
        lines.append([
            str(row["step"]), f"{row['warm_start']['nll']:.3f}", best_label(best), f"{best['nll']:.3f}",
            with_interval(best, "gain", sign="+"), f"{temperature_of(temperature['mu']):.2f}",
            with_interval(temperature, "gain", sign="+"), with_interval(best["over_temperature"], "gain", sign="+"),
            row["worth"]["text"],
        ])  # fmt: skip
    return head, lines


def best_label(best: dict) -> str:
    """Direction and strength of a row of the fair table."""
    return f"{best['direction']}, mu {best['mu']:.2f}"


def worth_sentences(rows: list[dict]) -> list[str]:
    """For each checkpoint what its steering is worth; where no gain over warm start and temperature is shown, that."""
    said = []
    for row in rows:
        best, name = row["best"], f"After {row['step']} steps"
        over = best["over_temperature"]
        ends = [found["interval"] for found in (best, over)]
        if None in ends:
            said.append(f"{name} nothing is known: there are too few sequences for an interval.")
        elif any(low <= 0 for low, _ in ends):
            what = "warm start alone" if ends[0][0] <= 0 else "best temperature"
            said.append(f"{name} steering ({best_label(best)}) is not shown to gain over the {what}.")
        else:
            said.append(
                f"{name}, steered with {best_label(best)}: the NLL of {row['worth']['text']} steps of the warm start alone."
            )
    return said


def steps_markdown(rows: list[dict], task: str, metric: str) -> str:
    """The tables of `evaluate_steps`, and one sentence for each checkpoint, or for those without a gain."""
    silent = [str(row["step"]) for row in rows if row["nll_difference"]["verdict"] == "no gain is shown"]
    words = (
        f"\nKept NLL: no gain is shown after {', '.join(silent)} steps: the interval contains 0.\n" if silent else ""
    )
    silent = [str(r["step"]) for r in rows if r["metric_difference"].get("verdict") == "no gain is shown"]
    words += (
        f"\n{metric}: no gain is shown after {', '.join(silent)} steps: the interval contains 0.\n" if silent else ""
    )
    return (
        f"# {task}: gain over warm-start steps\n\n## The best way of decoding, and what it is worth\n\n"
        f"{markdown_table(*worth_table(rows))}\n{WORTH_CAPTION}\n\n"
        f"{''.join(f'- {sentence}{chr(10)}' for sentence in worth_sentences(rows))}\n"
        f"## The paper's setting\n\n{markdown_table(*steps_table(rows, metric))}\n{CAPTION}\n{words}"
    )


def steps_table(rows: list[dict], metric: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows; the first NLL in nats per kept gold token."""
    head = ["steps", "coverage", "mu", "kept NLL, warm start", "kept NLL, SVDecode", "difference [95%]",
            f"{metric}, warm start", f"{metric}, SVDecode", "difference [95%]"]  # fmt: skip
    lines = []
    for row in rows:
        nll, scores = row["nll"], row["metric"]
        lines.append([
            str(row["step"]), f"{row['coverage']:.2f}", f"{row['mu']:.2f}",
            f"{nll['warm start']:.3f}", f"{nll['SVDecode']:.3f}", with_interval(row["nll_difference"], "difference", sign="+"),
            *(f"{scores[name]['mean']:.3f}" if name in scores else "" for name in ("warm start", "SVDecode")),
            with_interval(row["metric_difference"], "difference", sign="+"),
        ])  # fmt: skip
    return head, lines
