"""NLL and perplexity of any text: a text file, rows with a `text` column, or rows that a warm start can learn from."""

from __future__ import annotations

from svdecode.data.conversations import Row, is_conversation, texts_of
from svdecode.data.examples import COLUMNS, examples_of
from svdecode.evaluation.tasks.base import TOKENS, Metric, Question, Task, need_columns

NAME = "nll"


def questions(rows: list[dict], few_shot: list[dict] | None) -> list[Question]:
    """A text is one question without a prompt; the tokens of a completion are counted, those of its prompt are not.

    A conversation is one question, and one item for each turn that carries loss.
    """
    if all(is_conversation(row) for row in rows):
        return [_of_conversation(row) for row in examples_of(rows)]
    if "text" in rows[0]:
        need_columns(rows, ("text",), NAME)
        return [Question(text=row["text"][:80], prompt="", completion=row["text"], ends=False) for row in rows]
    pairs = pairs_of(rows, NAME, "a column text, or ")
    return [Question(text=one["prompt"], prompt=one["prompt"], completion=one["completion"]) for one in pairs]


def _of_conversation(example: Row) -> Question:
    prompt, completion = texts_of(example)
    return Question(text=prompt[-80:], prompt=prompt, completion=completion, chat=example)


def pairs_of(rows: list[dict], task: str, other: str = "") -> list[dict[str, str]]:
    """{"prompt", "completion"} of each row; ValueError where the rows are of no such layout, or a text is empty.

    Args:
        rows: with normalised column names.
        task: its name, for messages.
        other: what else the task takes, for messages.
    """
    if any(is_conversation(row) for row in rows):
        raise ValueError(
            f"data for {task} need texts in prompt and completion, got conversations (messages) in some rows"
        )
    examples = examples_of(rows)
    if examples is None:
        found = ", ".join(rows[0]) or "none"
        raise ValueError(f"data for {task} need {other}prompt and completion, got {found}")
    need_columns(examples, COLUMNS, task)
    return examples


TASK = Task(name=NAME, metrics=(Metric("NLL", higher_is_better=False),), how=TOKENS, questions=questions)
