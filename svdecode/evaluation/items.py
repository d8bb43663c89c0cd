"""Questions as token ids, in the batches in which they are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svdecode.data.batches import prompt_ids
from svdecode.data.chat import labelled_tokens
from svdecode.evaluation.tasks.base import CHOICES, TOKENS, Question, Task
from svdecode.models.adapters import causal_lm_of
from svdecode.models.reach import most_positions

MAX_LENGTH = 512
"""Tokens of a window of plain text (paper: length 512)."""


@dataclass(frozen=True)
class Item:
    """A question for the models; plain text gives one for each window."""

    index: int
    question: Question
    prompt: list[int]
    answers: list[list[int]]


def encode_items(
    task: Task, questions: Sequence[Question], tokenizer: object, limit: int | None, max_length: int = MAX_LENGTH
) -> list[Item]:
    """The first `limit` items; ValueError where nothing is left to predict."""
    found = []
    for question in questions:
        for prompt, answers in _encoded(task, question, tokenizer, max_length):
            if any(not answer for answer in answers):
                raise ValueError(f"an answer to {question.text!r:.60} has no token")
            found.append(Item(len(found), question, prompt, answers))
            if len(found) == limit:
                return found
    if not found:
        raise ValueError(f"data for {task.name} has no token to predict")
    return found


def window(model: object) -> int:
    """Tokens of a window of plain text: MAX_LENGTH, or what the model takes."""
    return min(MAX_LENGTH, most_positions(causal_lm_of(model)) or MAX_LENGTH)


def check_length(items: list[Item], model: object, extra: int) -> None:
    """ValueError where prompt and answer, or prompt and `extra` new tokens, are more than the model's positions."""
    limit = most_positions(causal_lm_of(model))
    longest = max(len(item.prompt) + max(map(len, item.answers), default=extra) for item in items)
    if limit is not None and longest > limit:
        raise ValueError(f"the longest prompt with its answer has {longest} tokens, the model takes {limit}")


def chunks(task: Task, items: list[Item], batch_size: int) -> list[list[Item]]:
    """What is run, recorded and resumed as a whole: one question with all its choices, or a batch of questions.

    They depend on nothing but the run's settings, so that a resumed or sharded run meets the same batches.
    """
    size = 1 if task.how == CHOICES else batch_size
    return [items[i : i + size] for i in range(0, len(items), size)]


def gold_rows(question: Question, tokenizer: object, max_length: int = MAX_LENGTH) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) as token ids; of plain text its windows; of a conversation each labelled turn after all before."""
    if question.chat is not None:
        ids, turns = labelled_tokens(question.chat, tokenizer)
        return [(ids[:begin], ids[begin:end]) for begin, end in turns]
    if not question.prompt:
        # Windows that do not overlap; the first token of each predicts and is not predicted.
        ids = tokenizer(question.completion).input_ids
        windows = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        return [(window[:1], window[1:]) for window in windows if len(window) > 1]
    end = [] if tokenizer.eos_token_id is None or not question.ends else [tokenizer.eos_token_id]
    return [(_prompt(question, tokenizer), _continued(question.completion, tokenizer) + end)]


def _encoded(task: Task, question: Question, tokenizer: object, max_length: int) -> list[tuple[list[int], list]]:
    if task.how == TOKENS:
        return [(prompt, [answer]) for prompt, answer in gold_rows(question, tokenizer, max_length)]
    answers = [_continued(answer, tokenizer) for answer in question.answers] if task.how == CHOICES else []
    return [(_prompt(question, tokenizer), answers)]


def _prompt(question: Question, tokenizer: object) -> list[int]:
    ids = prompt_ids(question.prompt, tokenizer)
    if not ids:
        raise ValueError(f"the prompt of {question.text!r:.60} has no token")
    return ids


def _continued(text: str, tokenizer: object) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
