"""NLL of gold tokens, and its first two derivatives in mu, at many strengths, out of both models' logits of a few rows.

    NLL(mu)   = log sum_v exp(z_v + mu delta_v) - (z_y + mu delta_y)
    NLL'(mu)  = E_q[delta] - delta_y
    NLL''(mu) = Var_q[delta],   q the steered distribution

Outside the kept set K all tokens move alike, by |mu| times the penalty. So they stand for one more token, whose probability is
theirs together and whose delta is the penalty, with the sign of mu. All is taken relative to the gold token, so that nothing
large cancels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from svdecode.constants import KL, LOG_RATIO
from svdecode.ops.steering_vector import steering_vector
from svdecode.strength.family import TEMPERATURE, Family

# Entries of a (rows, strengths, tokens) tensor.
_CPU_ENTRIES, _GPU_ENTRIES = 2**20, 2**26
# exp of less is nothing beside 1, and numbers that small are slow on a CPU.
_LEAST = -80.0


class Rows(NamedTuple):
    """What all families need of R rows with a gold token each."""

    scores: Tensor  # (R, V) float32, logits of the warm start
    logprobs: Tensor  # (R, V) float32, its log-probabilities
    log_ratio: Tensor  # (R, V) float32, delta of direction "log_ratio"
    labels: Tensor  # (R,) int64


class Found(NamedTuple):
    """The NLL of R rows at M strengths."""

    sums: Tensor  # (R, M, 3) float64: NLL and its first two derivatives; 0 where the gold token is not scored
    ends: Tensor  # (R, 2) float64: the limits of the slope at mu = -infinity and +infinity
    scored: Tensor  # (R,) bool


class _Entries(NamedTuple):
    """The tokens of a row that count, relative to its gold token, as they are for one sign of mu."""

    scores: Tensor  # (R, W) float32: log(p_v / p_y), -inf where nothing is
    deltas: Tensor  # (R, W) float32: delta_v - delta_y, 0 where nothing is


def rows_of(pre: Tensor, ft: Tensor, labels: Tensor) -> Rows:
    """Of logits (R, V) and gold tokens (R,)."""
    scores = ft.float()
    log_ratio = steering_vector(pre, ft, alpha=0.0, direction=LOG_RATIO).float()
    return Rows(scores, scores.log_softmax(-1), log_ratio, labels)


def nll_of(rows: Rows, family: Family, mus: Tensor) -> Found:
    """The rows' NLL under a family, at strengths (M,); of two zeros the first is the end of the negative half."""
    at_labels = rows.labels[:, None]
    deltas = {
        KL: lambda: rows.logprobs.exp() * rows.log_ratio,
        LOG_RATIO: lambda: rows.log_ratio,
        TEMPERATURE: lambda: torch.where(rows.logprobs > -math.inf, rows.logprobs, 0.0),
    }[family.direction]()
    gold_score, gold_delta = (values.gather(1, at_labels) for values in (rows.logprobs, deltas))
    scored = gold_score.squeeze(1) > -math.inf
    if family.alpha == 0:
        # Nothing is outside, and both signs of mu have the same entries.
        negative = positive = _relative(rows.logprobs, deltas, gold_score, gold_delta)
    else:
        kept = rows.scores >= rows.scores.amax(-1, keepdim=True) + math.log(family.alpha)
        gold_kept = kept.gather(1, at_labels)
        inside = _packed(kept, rows.logprobs, deltas)
        if family.penalty == -math.inf:
            scored = scored & gold_kept.squeeze(1)
            negative = positive = _relative(*inside, gold_score, gold_delta)
        else:
            rest = rows.logprobs.masked_fill(kept, -math.inf).logsumexp(-1, keepdim=True)
            negative, positive = (
                _relative(
                    torch.cat([inside[0], rest], 1),
                    torch.cat([inside[1], torch.full_like(rest, outside)], 1),
                    gold_score,
                    torch.where(gold_kept, gold_delta, outside),
                )
                for outside in (-family.penalty, family.penalty)
            )
    split = int((mus < 0).sum()) + 1 if bool((mus == 0).any()) else int((mus < 0).sum())
    halves = [_at(negative, mus[:split]), _at(positive, mus[split:])]
    lowest = torch.where(negative.scores > -math.inf, negative.deltas, math.inf).amin(1)
    highest = torch.where(positive.scores > -math.inf, positive.deltas, -math.inf).amax(1)
    sums, ends = torch.cat(halves, 1), torch.stack([lowest, highest], 1).double()
    return Found(sums.masked_fill(~scored[:, None, None], 0.0), ends.masked_fill(~scored[:, None], 0.0), scored)


def _relative(scores: Tensor, deltas: Tensor, gold_score: Tensor, gold_delta: Tensor) -> _Entries:
    there = scores > -math.inf
    return _Entries(scores - gold_score, torch.where(there, deltas - gold_delta, 0.0))


def _packed(kept: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and deltas of the kept tokens, (R, W) with W the most that a row has; -inf and 0 where a row has fewer."""
    row, token = kept.nonzero(as_tuple=True)
    counts = kept.sum(1)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    width = max([1, *counts.tolist()])
    packed = []
    for source, filler in zip(values, (-math.inf, 0.0), strict=True):
        target = source.new_full((len(kept), width), filler)
        target[row, place] = source[row, token]
        packed.append(target)
    return packed[0], packed[1]


def _at(entries: _Entries, mus: Tensor) -> Tensor:
    """(R, M, 3) float64, a few rows at a time: a CPU works on what its cache holds, a GPU on much at once."""
    size = _CPU_ENTRIES if entries.scores.device.type == "cpu" else _GPU_ENTRIES
    rows = max(1, size // max(1, len(mus) * entries.scores.shape[1]))
    mus = mus.to(entries.scores)
    if not len(entries.scores) or not len(mus):
        return mus.new_zeros(len(entries.scores), len(mus), 3, dtype=torch.float64)
    parts = [_of_block(*block, mus) for block in zip(*(values.split(rows) for values in entries), strict=True)]
    return torch.cat(parts)


def _of_block(scores: Tensor, deltas: Tensor, mus: Tensor) -> Tensor:
    steered = torch.addcmul(scores[:, None], mus[None, :, None], deltas[:, None])  # (R, M, W)
    top = steered.amax(2, keepdim=True)
    weights = steered.sub_(top).clamp_(min=_LEAST).exp_()
    powers = torch.stack([torch.ones_like(deltas), deltas, deltas.square()], 1)  # (R, 3, W)
    mass, first, second = torch.bmm(powers, weights.transpose(1, 2)).double().unbind(1)
    slope = first / mass
    nll = top.squeeze(2) + mass.log()
    return torch.stack([nll, slope, (second / mass - slope.square()).clamp(min=0.0)], 2)
