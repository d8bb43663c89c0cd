"""Evaluation: pre-trained, warm start, SVDecode and its ablations on the same questions, with paired intervals."""

from __future__ import annotations

from svdecode.evaluation.report import Report
from svdecode.evaluation.run import evaluate
from svdecode.evaluation.steps import evaluate_steps
from svdecode.evaluation.tasks import TASKS

__all__ = ["TASKS", "Report", "evaluate", "evaluate_steps"]
