"""The strength of every setting on planted logits, against dense grids of the float64 reference; memory; readings."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from planted_logits import planted, statistics

import svdecode
from svdecode.calibration import collect as collection
from svdecode.strength.family import TEMPERATURE, Family

SETTINGS = [
    Family(direction, alpha, penalty)
    for direction, alpha, penalty in itertools.product(("kl", "log_ratio"), (0.0, 0.1), (-math.inf, 0.0, -1.0))
]


def planted_rows(count: int, vocabulary: int = 200, seed: int = 0):
    """Logits of two models, and gold tokens drawn from the steered distribution, so that the best strength is of order 1."""
    draw = torch.Generator().manual_seed(seed)
    pre = 2 * torch.randn(count, vocabulary, generator=draw)
    ft = pre + torch.randn(count, vocabulary, generator=draw)
    target = svdecode.fused_steer(pre, ft, 0.8, alpha=0.0, direction="log_ratio").logprobs
    return pre, ft, torch.multinomial(target.exp(), 1, generator=draw).squeeze(1)


def reference_nll(pre, ft, labels, family: Family, mus) -> torch.Tensor:
    """(M,) mean NLL of the tokens that are scored."""
    mus = torch.as_tensor(mus, dtype=torch.float64)
    if family.direction == TEMPERATURE:
        scores = ft.double().log_softmax(-1)[:, None] * (1 + mus[None, :, None])
        found = -scores.log_softmax(-1).gather(2, labels[:, None, None].expand(-1, len(mus), 1)).squeeze(2)
        return found.mean(0)
    found = svdecode.steered_nll(
        pre.double(), ft.double(), labels, mus, alpha=family.alpha, penalty=family.penalty,
        direction=family.direction, backend="reference",
    )  # fmt: skip
    return found[found[:, 0].isfinite()].mean(0)


def best_of_a_grid(pre, ft, labels, family: Family) -> float:
    """The best strength of a dense grid, made ever finer around its best point."""
    low, high = (-0.95, 9.0) if family.direction == TEMPERATURE else (-50.0, 50.0)
    for _ in range(12):
        grid = torch.linspace(low, high, 201, dtype=torch.float64)
        best = int(reference_nll(pre, ft, labels, family, grid).argmin())
        low, high = grid[max(best - 1, 0)].item(), grid[min(best + 1, 200)].item()
    return (low + high) / 2


@pytest.mark.parametrize("family", [*SETTINGS, Family(TEMPERATURE, 0.0)], ids=str)
def test_exact_strength_of_every_setting(family):
    pre, ft, labels = planted_rows(240)
    if family.direction == TEMPERATURE:
        first, second, batches = planted(pre, ft, labels, 4)
        curve = collection.collect(second, batches, [family], pretrained=first).curves[family]
    else:
        curve = statistics(pre, ft, labels, family, length=4).curve
    best = best_of_a_grid(pre, ft, labels, family)
    assert curve.minima().item() == pytest.approx(best, abs=1e-4)
    assert curve.error() < 1e-4 * max(1, abs(best))
    for mu in (0.0, best, 1.07 * best, 0.9 * best):
        assert curve.mean(mu) == pytest.approx(reference_nll(pre, ft, labels, family, [mu]).item(), abs=2e-5)
    for mu in (
        -0.3,
        0.4,
        5.0,
        *(() if family.direction == TEMPERATURE else (-20.0,)),
    ):  # far from what was looked at closely
        assert curve.mean(mu) == pytest.approx(reference_nll(pre, ft, labels, family, [mu]).item(), rel=0.02, abs=0.02)
