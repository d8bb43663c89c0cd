"""Settings chosen by what a task asks for: mu, alpha, penalty and direction, by a metric over a small grid.

The best of many settings looks better than it is on the data that chose it. So the choice is repeated on each half of the
sequences and judged on the other half ("cross_fitted"), and equal scores go to the weaker steering, down to none at all.
A metric is one function and one entry of `METRICS`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from svdecode.calibration.statistics import labelled_logits
from svdecode.common.distributed import gather, is_main, rank_and_size, shard
from svdecode.constants import ALPHA, IGNORE_INDEX, KL, LOG_RATIO
from svdecode.data.batches import numbered_batches
from svdecode.decoding.answers import answer_all
from svdecode.decoding.generate import generate
from svdecode.models.steer import steer
from svdecode.models.steered_model import SteeredModel
from svdecode.ops.setting import Setting
from svdecode.ops.steered_nll import steered_nll
from svdecode.strength.bootstrap import interval, ratio_draws

LONGEST_ANSWER = 64


class Grid(NamedTuple):
    """The settings to compare: every combination, and the warm start alone."""

    mus: tuple[float, ...]
    alphas: tuple[float, ...]
    penalties: tuple[float, ...]
    directions: tuple[str, ...] = (KL, LOG_RATIO)

    def settings(self) -> list[Setting]:
        """The warm start first, then weaker before stronger steering."""
        rest = itertools.product(sorted(self.mus), self.alphas, self.penalties, self.directions)
        return [Setting(0.0, ALPHA, self.penalties[0], KL), *itertools.starmap(Setting, rest)]


class Source(NamedTuple):
    """The models and data that a metric works with."""

    steered: SteeredModel
    data: object
    tokenizer: object | None
    batch_size: int
    max_length: int | None
    progress: bool


class Scores(NamedTuple):
    """A setting's score is sum(values) / sum(weights) over the sequences; more is better."""

    values: Tensor  # (settings, S) float64
    weights: Tensor  # (S,) float64


class Metric(NamedTuple):
    """How to score settings, and the ones to try."""

    score: Callable[[Source, Sequence[Setting]], Scores]
    grid: Grid
    meaning: str


@torch.inference_mode()
def negative_nll(source: Source, settings: Sequence[Setting]) -> Scores:
    """Minus the mean NLL of all gold tokens; all settings from one forward of both models over the data."""
    found, count = numbered_batches(source.data, source.tokenizer, source.batch_size, source.max_length)
    rank, size = rank_and_size()
    mine = itertools.islice(found, rank, None, size)
    share = None if count is None else len(range(rank, count, size))
    families: dict[Setting, list[int]] = {}
    for index, setting in enumerate(settings):
        families.setdefault(setting._replace(mu=0.0), []).append(index)
    parts = []
    for batch in tqdm(mine, total=share, desc="select by nll", disable=not source.progress or rank > 0):
        pre, ft, labels = labelled_logits(source.steered, batch)
        rows = len(batch["labels"])
        sums = torch.empty(len(settings), rows, dtype=torch.float64)
        for family, members in families.items():
            mus = torch.tensor([settings[i].mu for i in members], dtype=torch.float32, device=ft.device)
            nll = steered_nll(pre, ft, labels, mus, **family.keywords)
            sums[members] = nll.double().unflatten(0, (rows, -1)).sum(1).T.cpu()
        tokens = (labels != IGNORE_INDEX).unflatten(0, (rows, -1)).sum(1).cpu()
        parts.append((batch["sequence"], -sums, tokens))
    numbers, values, tokens = (torch.cat(column, -1) for column in zip(*gather(parts), strict=True))
    order = numbers.argsort()
    order = order[tokens[order] > 0]
    return Scores(values[:, order], tokens[order].double())


def exact_match(source: Source, settings: Sequence[Setting]) -> Scores:
    """Share of greedy answers, first lines, that equal the completion but for case and outer punctuation and spaces."""

    if (
        source.tokenizer is None
        or not isinstance(source.data[0], dict)
        or not isinstance(source.data[0].get("prompt"), str)
    ):
        raise ValueError("data must be texts with prompt and completion, and tokenizer given, for select='exact_match'")
    examples = list(source.data)
    lengths = [len(source.tokenizer(example["completion"]).input_ids) for example in examples]
    mine, steered, columns = shard(examples), source.steered, []
    for index, setting in enumerate(settings):
        steered.settings = setting
        answers = answer_all(
            functools.partial(generate, steered),
            source.tokenizer,
            mine,
            name=f"setting {index + 1} of {len(settings)}",
            device=steered.device,
            max_new_tokens=min(max(lengths) + 1, LONGEST_ANSWER),
            batch_size=source.batch_size,
            progress=source.progress and is_main(),
        )
        columns.append(answers.correct)
    rows = gather([list(row) for row in zip(*columns, strict=True)])
    return Scores(torch.tensor(rows, dtype=torch.float64).T, torch.ones(len(rows), dtype=torch.float64))


METRICS = {
    "nll": Metric(
        negative_nll,
        Grid(mus=(0.1, 0.25, 0.5, 1.0, 2.0, 4.0), alphas=(0.01, 0.1, 0.3), penalties=(0.0, -1.0)),
        "minus the mean NLL of all gold tokens, nats",
    ),
    "exact_match": Metric(
        exact_match,
        Grid(mus=(0.25, 0.5, 1.0, 2.0), alphas=(ALPHA,), penalties=(-math.inf, 0.0)),
        "share of greedy answers equal to the completion",
    ),
}


def check_metric(name: str) -> Metric:
    """The metric of that name; ValueError lists those that exist."""
    if name not in METRICS:
        raise ValueError(f"select must be one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]


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
        grid: None takes the metric's own.
        seed: of the bootstrap and of the halves.
        progress: show bars on stderr.

    Returns:
        "metric", "meaning", "best" (a row of the table), "table" (a row for each setting: mu, alpha, penalty, direction, score,
        and against the warm start, which is the first row, gain and its 95% interval), "cross_fitted" (gain and interval of a
        choice that did not see what it is judged on; None with fewer than 2 sequences) and "num_sequences".
    """

    chosen = check_metric(metric)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ValueError("data must be a list or a Dataset where select= is given: it is read more than once")
    if not len(data):
        raise ValueError("data is empty")
    settings = (grid or chosen.grid).settings()
    steered = steer(model, pretrained=pretrained, mu=0.0)
    scores = chosen.score(Source(steered, data, tokenizer, batch_size, max_length, progress), settings)
    if not len(scores.weights):
        raise ValueError("data has no labelled token: it is empty, or all labels are -100")
    means = scores.values.sum(1) / scores.weights.sum()
    table = [
        {**setting._asdict(), "score": mean, "gain": mean - means[0].item(), "interval": _interval(scores, index, seed)}
        for index, (setting, mean) in enumerate(zip(settings, means.tolist(), strict=True))
    ]
    return {
        "metric": metric,
        "meaning": chosen.meaning,
        "best": table[_best(means)],
        "table": table,
        "cross_fitted": _cross_fitted(scores, seed),
        "num_sequences": len(scores.weights),
    }


def _best(means: Tensor) -> int:
    """The first of the largest scores."""
    return int((means == means.max()).nonzero()[0])


def _interval(scores: Scores, index: int, seed: int) -> list[float] | None:
    if len(scores.weights) < 2:
        return None
    return list(interval(ratio_draws(scores.values[index] - scores.values[0], scores.weights, seed)))


def _cross_fitted(scores: Scores, seed: int) -> dict[str, object] | None:
    count = len(scores.weights)
    if count < 2:
        return None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    differences = torch.empty(count, dtype=torch.float64)
    for fitted, judged in ((order[: count // 2], order[count // 2 :]), (order[count // 2 :], order[: count // 2])):
        best = _best(scores.values[:, fitted].sum(1) / scores.weights[fitted].sum())
        differences[judged] = scores.values[best, judged] - scores.values[0, judged]
    draws = ratio_draws(differences, scores.weights, seed)
    return {"gain": (differences.sum() / scores.weights.sum()).item(), "interval": list(interval(draws))}
