"""How a selection scores settings. A metric is one function, and one entry of `METRICS`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from svdecode.calibration.collect import Batches
from svdecode.calibration.grids import Scale
from svdecode.calibration.statistics import GoldRows, gold_rows
from svdecode.common.distributed import gather, is_main, shard
from svdecode.decoding.answers import answer_all
from svdecode.decoding.generate import generate
from svdecode.models.steered_model import SteeredModel
from svdecode.ops.setting import Setting
from svdecode.ops.steer_sample import steer_sample
from svdecode.ops.steered_nll import steered_nll
from svdecode.strength.family import Family

LONGEST_ANSWER = 64


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
    scale: Scale
    meaning: str
    screen: Callable[[Source, Sequence[Setting]], Scores] | None = None
    """A cheap score, where `score` is too slow for all settings; both need texts with prompt and completion."""


@torch.inference_mode()
def negative_nll(source: Source, settings: Sequence[Setting]) -> Scores:
    """Minus the mean NLL of all gold tokens; all settings from one forward of both models over the data."""
    families: dict[Family, list[int]] = {}
    for index, setting in enumerate(settings):
        families.setdefault(Family(setting.direction, setting.alpha, setting.penalty), []).append(index)

    def score(rows: GoldRows) -> Tensor:
        found = torch.empty(len(settings), len(rows.labels), dtype=torch.float64)
        for family, members in families.items():
            mus = torch.tensor([settings[i].mu for i in members], dtype=torch.float32, device=rows.ft.device)
            found[members] = -steered_nll(rows.pre, rows.ft, rows.labels, mus, **family.keywords).double().T.cpu()
        return found

    values, tokens = _of_gold_rows(source, score, "select by nll")
    return Scores(values, tokens)


@torch.inference_mode()
def first_choices(source: Source, settings: Sequence[Setting]) -> Scores:
    """Share of sequences whose gold tokens are all first choices; a sequence counts half where only the last one is not.

    The last one ends the answer: without it the answer goes on, perhaps on a line of its own. All settings from one forward.
    """

    def score(rows: GoldRows) -> Tensor:
        right = torch.stack(
            [
                steer_sample(rows.pre, rows.ft, one.mu, temperature=0.0, **one.keywords)[0] == rows.labels
                for one in settings
            ]
        )
        following = torch.nn.functional.pad(rows.owner[1:], (0, 1), value=-1)
        last = (rows.owner != following).to(right.device)
        return torch.cat([right & ~last, right & last]).double().cpu()

    values, tokens = _of_gold_rows(source, score, "screen")
    before, last = values.chunk(2)
    return Scores((before == tokens - 1) * (1 + last) / 2, torch.ones_like(tokens))


def _of_gold_rows(source: Source, score: Callable[[GoldRows], Tensor], name: str) -> tuple[Tensor, Tensor]:
    """(settings, S) float64 sums of a score (settings, rows) over each sequence's gold tokens, and how many there are, (S,)."""
    batches = Batches(source.data, source.tokenizer, source.batch_size, source.max_length)
    parts = []
    for batch in tqdm(batches, total=batches.count, desc=name, disable=not (source.progress and is_main())):
        rows = gold_rows(source.steered, batch)
        found = score(rows)
        sums = found.new_zeros(len(found), len(rows.sequence)).index_add_(1, rows.owner, found)
        parts.append((rows.sequence, sums, torch.bincount(rows.owner, minlength=len(rows.sequence))))
    numbers, values, tokens = (torch.cat(column, -1) for column in zip(*gather(parts), strict=True))
    order = numbers.argsort()
    order = order[tokens[order] > 0]
    return values[:, order], tokens[order].double()


def exact_match(source: Source, settings: Sequence[Setting]) -> Scores:
    """Share of greedy answers, first lines, that equal the completion but for case and outer punctuation and spaces."""
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
        Scale(factors=(0.5, 1.0, 2.0), penalties=(0.0, -1.0)),
        "minus the mean NLL of all gold tokens, nats",
    ),
    "exact_match": Metric(
        exact_match,
        Scale(factors=(0.25, 0.5, 1.0, 2.0, 4.0), penalties=(-math.inf,)),
        "share of greedy answers equal to the completion",
        first_choices,
    ),
}


def check_metric(name: str) -> Metric:
    """The metric of that name; ValueError lists those that exist."""
    if name not in METRICS:
        raise ValueError(f"select must be one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]
