"""TruthfulQA, generation: one-line answers, which a judge finds true and informative or not (`svdecode.evaluation.judge`)."""

from __future__ import annotations

from svdecode.evaluation.tasks import truthfulqa
from svdecode.evaluation.tasks.base import TEXT, Metric, Question, Task

NAME = "truthfulqa_gen"


def questions(rows: list[dict], few_shot: list[dict] | None) -> list[Question]:
    """Gold: the reference answers that the judge is shown."""
    examples, test = truthfulqa.split_examples(rows, few_shot, NAME)
    return [
        Question(
            text=row["question"].strip(),
            prompt=truthfulqa.prompt(examples, row["question"]),
            completion=f" {truthfulqa.with_period(row['best_answer'])}",
            gold={
                "true": truthfulqa.answer_list(row["correct_answers"]),
                "false": truthfulqa.answer_list(row["incorrect_answers"]),
            },
        )
        for row in test
    ]


TASK = Task(
    name=NAME,
    metrics=(
        Metric("true", binary=True),
        Metric("informative", binary=True),
        Metric("true and informative", binary=True),
    ),
    how=TEXT,
    questions=questions,
    max_new_tokens=50,
    one_line=True,
    takes_few_shot=True,
    judged=True,
    notes=truthfulqa.notes,
)
