"""What both TruthfulQA tasks share: the columns, the answers, the prompt with examples loaded from the data.

The prompt is the benchmark's (the paper's Table 10): examples "Q: ...\\nA: ...", a blank line between them, then the
question and "A:". The examples are rows of a file, or the first of the data, which then are no test questions.
"""

from __future__ import annotations

from svdecode.data.examples import question_prompt
from svdecode.evaluation.tasks.base import need_columns

EXAMPLES = 6
"""Examples in front of each question, as in the benchmark."""

COLUMNS = ("question", "best_answer", "correct_answers", "incorrect_answers")


def with_period(answer: str) -> str:
    """As the benchmark writes answers: trimmed, with a period at the end."""
    answer = answer.strip()
    return answer if answer.endswith((".", "?", "!")) and answer else answer + "."


def answer_list(value: object) -> list[str]:
    """Answers separated by ";", or a list of them; empty ones left out."""
    parts = value.split(";") if isinstance(value, str) else value
    return [with_period(part) for part in parts if part.strip()]


def split_examples(rows: list[dict], few_shot: list[dict] | None, task: str) -> tuple[list[dict], list[dict]]:
    """(examples, test rows). No question is in both."""
    need_columns(rows, COLUMNS, task)
    if few_shot is not None:
        need_columns(few_shot, COLUMNS[:2], f"{task}'s examples")
        examples = few_shot[:EXAMPLES]
    else:
        examples = rows[:EXAMPLES]
    used = {row["question"].strip() for row in examples}
    test = [row for row in rows if row["question"].strip() not in used]
    if not test:
        raise ValueError(f"data for {task} has no question left: {len(rows)} rows, all of them examples of the prompt")
    return examples, test


def notes(rows: list[dict], few_shot: list[dict] | None) -> list[str]:
    """Where the examples come from."""
    if few_shot is not None:
        count = min(len(few_shot), EXAMPLES)
        return [
            f"The prompt's {count} examples come from the given file; questions among them are left out of the test."
        ]
    return [f"The prompt's {min(len(rows), EXAMPLES)} examples are the first rows of the data, left out of the test."]


def prompt(examples: list[dict], question: str) -> str:
    """The examples, then the question."""
    turns = [f"{question_prompt(row['question'].strip())} {with_period(row['best_answer'])}\n\n" for row in examples]
    return "".join(turns) + question_prompt(question.strip())
