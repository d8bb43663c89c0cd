"""Exact match: is the first line of a generated answer the completion? For rows that a warm start can learn from.

Case, outer punctuation and outer spaces do not count, so that "paris." matches "Paris". `svdecode calibrate --select
exact_match` counts in the same way.
"""

from __future__ import annotations

from svdecode.decoding.answers import first_line, normalised
from svdecode.evaluation.tasks.base import TEXT, Metric, Question, Task
from svdecode.evaluation.tasks.nll import pairs_of

NAME = "exact_match"


def questions(rows: list[dict], few_shot: list[dict] | None) -> list[Question]:
    """One question per row with a prompt and a completion, in any layout of `svdecode.data.examples`."""
    return [
        Question(text=one["prompt"], prompt=one["prompt"], completion=one["completion"], gold=one["completion"])
        for one in pairs_of(rows, NAME)
    ]


def grade(question: Question, text: str) -> dict[str, float]:
    """1 where the first line of the text that is not empty equals the completion."""
    return {"exact match": float(normalised(first_line(text)) == normalised(question.gold))}


TASK = Task(name=NAME, metrics=(Metric("exact match", binary=True),), how=TEXT, questions=questions, grade=grade)
