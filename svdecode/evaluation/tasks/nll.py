"""NLL and perplexity of any text: a text file, rows with a `text` column, or rows with `prompt` and `completion`."""

from __future__ import annotations

from svdecode.evaluation.tasks.base import TOKENS, Metric, Question, Task, need_columns

NAME = "nll"


def questions(rows: list[dict], few_shot: list[dict] | None) -> list[Question]:
    """A text is one question without a prompt; the tokens of a completion are counted, those of its prompt are not."""
    if "text" in rows[0]:
        need_columns(rows, ("text",), NAME)
        return [Question(text=row["text"][:80], prompt="", completion=row["text"], ends=False) for row in rows]
    need_columns(rows, ("prompt", "completion"), NAME)
    return [Question(text=row["prompt"], prompt=row["prompt"], completion=row["completion"]) for row in rows]


TASK = Task(name=NAME, metrics=(Metric("NLL", higher_is_better=False),), how=TOKENS, questions=questions)
