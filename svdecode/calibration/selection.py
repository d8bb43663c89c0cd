"""Settings chosen by what a task asks for: mu, alpha, penalty and direction, by a metric.

The settings to compare lie around the exact strengths (`calibration/collect.py`): for each direction, threshold and penalty,
some multiples of the strength with the least NLL. The best strength for a task's answers is often another, but of that order.

The best of many settings looks better than it is on the data that chose it. So the choice is repeated on each half of the
sequences and judged on the other half ("cross_fitted"), and equal scores go to the weaker steering, down to none at all.

A metric that generates answers is slow, so it does not see all settings. Those are screened first, by one forward: a greedy
answer is the gold one where each gold token is the first choice after the gold tokens before it. The best setting of each half
goes on and answers all questions, beside the warm start. So the metric runs three times at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from svdecode.calibration.collect import collect
from svdecode.calibration.grids import Grid
from svdecode.calibration.metrics import Scores, Source, check_metric
from svdecode.data.examples import COLUMNS
from svdecode.models.steer import steer
from svdecode.strength.bootstrap import halves, paired_gain
from svdecode.strength.family import MAX_STRENGTH
from svdecode.strength.nll_curve import NLLCurve

_LEAST_SCALE = 0.05
"""An exact strength nearer to 0 says nothing of the scale."""


def select_settings(
    model: object,
    data: object,
    metric: str,
    *,
    pretrained: object | None = None,
    tokenizer: object | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    grid: Grid | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare the settings of a grid by a metric.

    Args:
        model: as in `calibrate`, like `data`, `pretrained`, `tokenizer`, `batch_size` and `max_length`.
        data: a list or a Dataset, for it is read more than once.
        metric: a name in `METRICS`.
        pretrained: see `calibrate`.
        tokenizer: see `calibrate`.
        batch_size: see `calibrate`.
        max_length: see `calibrate`.
        grid: settings to compare; None takes multiples of the exact strengths, as the metric's `Scale` says.
        seed: of the bootstrap and of the halves.
        progress: show bars on stderr.

    Returns:
        "metric", "meaning", "best" (a row of the table), "table" (a row for each setting: mu, alpha, penalty, direction, score,
        and against the warm start, which is the first row, gain and its 95% interval; these three are None for settings that
        were screened out, and "screened" is the cheap score, where there is one), "cross_fitted" (gain and interval of a choice
        that did not see what it is judged on; None with fewer than 2 sequences) and "num_sequences".
    """

    chosen = check_metric(metric)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ValueError("data must be a list or a Dataset where select= is given: it is read more than once")
    if not len(data):
        raise ValueError("data is empty")
    if chosen.screen is not None:
        first = data[0]
        texts = isinstance(first, Mapping) and all(isinstance(first.get(name), str) for name in COLUMNS)
        if tokenizer is None or not texts:
            raise ValueError(
                f"data must be texts with prompt and completion, and tokenizer given, for select={metric!r}"
            )
    source = Source(steer(model, pretrained=pretrained, mu=0.0), data, tokenizer, batch_size, max_length, progress)
    if grid is not None:
        settings = grid.settings()
    else:
        shared: dict[str, Any] = dict(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size)
        bar = "exact strengths" if progress else None
        found = collect(model, data, chosen.scale.families(), max_length=max_length, seed=seed, progress=bar, **shared)
        settings = chosen.scale.settings({family: _scale_of(curve) for family, curve in found.curves.items()})
    screened, winners = None, None
    if chosen.screen is not None:
        screened = chosen.screen(source, settings)
        winners = [_best(_means(screened, half)) for half in halves(len(screened.weights), seed)]
    ran = list(range(len(settings))) if winners is None else sorted({0, *winners})
    scores = chosen.score(source, [settings[index] for index in ran])
    if not len(scores.weights):
        raise ValueError("data has no labelled token: it is empty, or all labels are -100")
    means = _means(scores)
    table: list[dict[str, Any]] = [
        {**setting._asdict(), "score": None, "gain": None, "interval": None} for setting in settings
    ]
    for place, index in enumerate(ran):
        against = paired_gain(scores.values[place] - scores.values[0], scores.weights, seed)
        table[index] |= {"score": means[place].item(), **against}
    if screened is not None:
        for row, score in zip(table, _means(screened).tolist(), strict=True):
            row["screened"] = score
    crossed = winners if winners is None else [ran.index(index) for index in winners]
    return {
        "metric": metric,
        "meaning": chosen.meaning,
        "best": table[ran[_best(means)]],
        "table": table,
        "cross_fitted": _cross_fitted(scores, seed, crossed),
        "num_sequences": len(scores.weights),
    }


def _scale_of(curve: NLLCurve) -> float:
    """The exact strength; 1 where there is no minimum, or none to speak of."""
    mu = curve.minima().nan_to_num(0.0).item()
    return mu if _LEAST_SCALE < abs(mu) < MAX_STRENGTH else 1.0


def _means(scores: Scores, sequences: Tensor | slice = slice(None)) -> Tensor:
    return scores.values[:, sequences].sum(1) / scores.weights[sequences].sum()


def _best(means: Tensor) -> int:
    """The first of the largest scores."""
    return int((means == means.max()).nonzero()[0])


def _cross_fitted(scores: Scores, seed: int, winners: list[int] | None) -> dict[str, object] | None:
    """The gain of each half's winner on the other half; `winners` are those of a screen, None lets the scores choose."""
    count = len(scores.weights)
    if count < 2:
        return None
    differences = torch.empty(count, dtype=torch.float64)
    for which, fitted in enumerate(halves(count, seed)):
        best = _best(_means(scores, fitted)) if winners is None else winners[which]
        differences[~fitted] = scores.values[best, ~fitted] - scores.values[0, ~fitted]
    return paired_gain(differences, scores.weights, seed)
