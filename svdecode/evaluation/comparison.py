"""How sure a system's figure is, and its difference to the warm start on the same questions."""

from __future__ import annotations

from torch import Tensor

from svdecode.common.intervals import bootstrap_interval, mcnemar, resamples, wilson
from svdecode.evaluation.tasks.base import Metric

NOT_KNOWN = "not known"
"""The verdict on a difference without an interval."""


def summary(metric: Metric, values: Tensor, weights: Tensor, seed: int = 0) -> dict[str, object]:
    """Mean and 95% interval of one system's values; no interval (None) from one value that is not right or wrong.

    Args:
        metric: binary ones get Wilson's interval, others the bootstrap.
        values: (N,) float64, one a question.
        weights: (N,) float64: what the mean is weighted with (1, or a text's tokens).
        seed: of the bootstrap.
    """
    successes = round(values.sum().item())
    interval = wilson(successes, len(values)) if metric.binary else _mean_interval(values, weights, seed)
    interval = None if interval is None else list(interval)
    return {"mean": _mean(values, weights), "interval": interval, "questions": len(values)}


def difference(metric: Metric, values: Tensor, baseline: Tensor, weights: Tensor, seed: int = 0) -> dict[str, object]:
    """Paired difference to the baseline with a bootstrap interval, McNemar's p for right or wrong, and a verdict in words."""
    changes = values - baseline
    ends = _mean_interval(changes, weights, seed)
    found = {
        "difference": _mean(changes, weights),
        "interval": None if ends is None else list(ends),
        "questions": len(values),
        "verdict": NOT_KNOWN if ends is None else verdict(metric, *ends),
    }
    if metric.binary:
        found["mcnemar_p"] = mcnemar(values > 0.5, baseline > 0.5)
    return found


def verdict(metric: Metric, low: float, high: float) -> str:
    """What an interval of a difference shows; no gain is claimed where it contains 0."""
    if low <= 0 <= high:
        return "no gain is shown"
    return "better" if (low > 0) == metric.higher_is_better else "worse"


def _mean(values: Tensor, weights: Tensor) -> float:
    return ((values * weights).sum() / weights.sum()).item()


def _mean_interval(values: Tensor, weights: Tensor, seed: int) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    if bool((weights == weights[0]).all()):
        return bootstrap_interval(values, seed)
    # A weighted mean is a ratio of two sums: both vary with the questions drawn.
    draws = resamples(len(values), seed)
    means = (values * weights)[draws].sum(-1) / weights[draws].sum(-1)
    return means.quantile(0.025).item(), means.quantile(0.975).item()
