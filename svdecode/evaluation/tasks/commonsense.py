"""The eight commonsense sets in the JSON format of LLM-Adapters: {"instruction", "output", "answer"}.

`instruction` holds the question in the paper's template (its Table 8), `output` the sentence that training teaches, `answer`
the label in it. By generation (as the paper does): the first allowed label in the generated text is the answer. By choices:
the log-probs of `output` with each allowed label put in place of the gold one.
"""

from __future__ import annotations

import functools
import re

from svdecode.data.examples import instruction_prompt
from svdecode.evaluation.tasks.base import CHOICES, TEXT, Metric, Question, Task, need_columns

NAMES = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
COLUMNS = ("instruction", "output", "answer")


def questions(rows: list[dict], few_shot: list[dict] | None, name: str) -> list[Question]:
    """Labels are those that occur in the data; a question's own are those that its instruction names."""
    need_columns(rows, COLUMNS, name)
    labels = sorted({row["answer"].strip() for row in rows})
    if len(labels) < 2:
        raise ValueError(f"data for {name}: every answer is {labels[0]!r}, there is nothing to choose from")
    return [_question(row, number, labels, name) for number, row in enumerate(rows, 1)]


def _question(row: dict, number: int, labels: list[str], name: str) -> Question:
    instruction, output, answer = row["instruction"].strip(), row["output"], row["answer"].strip()
    if answer not in output:
        raise ValueError(f"data for {name}, row {number}: 'output' does not contain the answer {answer!r}")
    named = [label for label in labels if label.lower() in instruction.lower()]
    allowed = named if len(named) > 1 and answer in named else labels
    start = output.rindex(answer)
    return Question(
        text=instruction,
        prompt=instruction_prompt(row),  # what `svdecode warmstart` trains on
        completion=output,
        answers=tuple(output[:start] + label + output[start + len(answer) :] for label in allowed),
        gold={"labels": allowed, "answer": answer},
    )


def extract(text: str, labels: list[str]) -> str | None:
    """The first label in a text, None where there is none; longer labels first, so that answer10 is not answer1."""
    found = re.search("|".join(map(re.escape, sorted(labels, key=len, reverse=True))), text)
    return found.group() if found else None


def grade_text(question: Question, text: str) -> dict[str, float]:
    """1 where the extracted label is the answer."""
    return {"accuracy": float(extract(text, question.gold["labels"]) == question.gold["answer"])}


def grade_choices(question: Question, logprobs: list[float]) -> dict[str, float]:
    """1 where the answer scores above every other choice."""
    right = question.gold["labels"].index(question.gold["answer"])
    return {"accuracy": float(all(logprobs[right] > v for i, v in enumerate(logprobs) if i != right))}


def task(name: str, score: str) -> Task:
    """One of NAMES, scored by "generate" or "choices"."""
    by_choices = score == "choices"
    return Task(
        name=name,
        metrics=(Metric("accuracy", binary=True),),
        how=CHOICES if by_choices else TEXT,
        questions=functools.partial(questions, name=name),
        grade=grade_choices if by_choices else grade_text,
    )
