"""What a task is: questions made of rows, and grades for what a system answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

CHOICES, TEXT, TOKENS = "choices", "text", "tokens"
"""How a task is measured: log-probs of given answers, generated text, or the NLL of a text's own tokens."""


@dataclass(frozen=True)
class Metric:
    """A number for each question, averaged over the questions."""

    name: str
    binary: bool = False
    """Right or wrong: Wilson's interval and McNemar's test apply."""
    higher_is_better: bool = True


@dataclass(frozen=True)
class Question:
    """One question, as a prompt and what may or should follow it."""

    text: str
    """What a reader sees in the records."""
    prompt: str
    completion: str
    """The gold answer as it follows the prompt, for calibration and NLL."""
    answers: tuple[str, ...] = ()
    """Choices, as they follow the prompt."""
    gold: object = None
    """What the task's `grade` needs to know; JSON."""
    ends: bool = True
    """Whether the completion ends the text, so that an end-of-sequence token belongs to its NLL."""
    chat: Mapping[str, object] | None = None
    """A conversation whose labelled turns are the gold answers, in place of `prompt` and `completion`, which name it then."""


@dataclass(frozen=True)
class Task:
    """An entry of the registry."""

    name: str
    metrics: tuple[Metric, ...]
    how: str
    """One of CHOICES, TEXT, TOKENS."""
    questions: Callable[..., list[Question]]
    """(rows, few_shot) -> questions; ValueError names the row and the column."""
    grade: Callable[[Question, object], dict[str, float]] | None = None
    """(question, log-probs of its answers or a text) -> a value for each metric; None where a judge grades."""
    max_new_tokens: int = 32
    one_line: bool = False
    takes_few_shot: bool = False
    judged: bool = False
    notes: Callable[[list, list | None], list[str]] = field(default=lambda rows, few_shot: [])
    """(rows, few_shot) -> sentences for the report."""


def need_columns(rows: list[dict[str, object]], columns: Iterable[str], task: str) -> None:
    """ValueError that names the first row without a non-empty value in one of the columns."""
    for number, row in enumerate(rows, 1):
        missing = [name for name in columns if not _filled(row.get(name))]
        if missing:
            found = ", ".join(name for name in row if name) or "none"
            raise ValueError(f"data for {task}, row {number}: no {missing[0]!r} (columns: {found})")


def _filled(value: object) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list | tuple) and len(value) > 0
