"""NLL and perplexity of any text: a text file, rows with a `text` column, or rows that a warm start can learn from."""

from __future__ import annotations

from svdecode.data.examples import COLUMNS, examples_of
from svdecode.evaluation.tasks.base import TOKENS, Metric, Question, Task, need_columns

NAME = "nll"


def questions(rows: list[dict], few_shot: list[dict] | None) -> list[Question]:
    """A text is one question without a prompt; the tokens of a completion are counted, those of its prompt are not."""
    if "text" in rows[0]:
        need_columns(rows, ("text",), NAME)
        return [Question(text=row["text"][:80], prompt="", completion=row["text"], ends=False) for row in rows]
    examples = examples_of(rows)
    if examples is None:
        raise ValueError(
            f"data for {NAME} need a column text, or prompt and completion, got {', '.join(rows[0]) or 'none'}"
        )
    need_columns(examples, COLUMNS, NAME)
    return [Question(text=one["prompt"], prompt=one["prompt"], completion=one["completion"]) for one in examples]


TASK = Task(name=NAME, metrics=(Metric("NLL", higher_is_better=False),), how=TOKENS, questions=questions)
