"""The registry of tasks, one file a family."""

from __future__ import annotations

from svdecode.evaluation.tasks import commonsense, exact_match, nll, truthfulqa_gen, truthfulqa_mc
from svdecode.evaluation.tasks.base import Task

SCORES = ("generate", "choices")
"""How the commonsense tasks are measured; the first is the paper's way and the default."""

TASKS = (truthfulqa_mc.NAME, truthfulqa_gen.NAME, *commonsense.NAMES, exact_match.NAME, nll.NAME)
"""Names that `find_task` knows."""

_SINGLE = {module.NAME: module.TASK for module in (truthfulqa_mc, truthfulqa_gen, exact_match, nll)}


def find_task(name: str, score: str | None = None) -> Task:
    """The task of a name; `score` is for the commonsense tasks. ValueError for an unknown name or way."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    if score not in (None, *SCORES):
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if name in commonsense.NAMES:
        return commonsense.task(name, score or SCORES[0])
    if score is not None:
        raise ValueError(f"score is for the commonsense tasks, not for {name}")
    return _SINGLE[name]
