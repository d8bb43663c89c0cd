"""The strength of every setting on planted logits, against dense grids of the float64 reference; memory; readings."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from planted_logits import best_of_a_grid, planted, planted_rows, reference_nll, statistics

import svdecode
from svdecode.calibration import collect as collection
from svdecode.calibration.row_nll import nll_of, rows_of
from svdecode.strength.family import MAX_STRENGTH, TEMPERATURE, Family
from svdecode.strength.nll_curve import NLLCurve

SETTINGS = [
    Family(direction, alpha, penalty)
    for direction, alpha, penalty in itertools.product(("kl", "log_ratio"), (0.0, 0.1), (-math.inf, 0.0, -1.0))
]


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


def test_a_kink_at_0_is_seen():
    """With a finite penalty below 0 the NLL rises on both sides of mu = 0 where the gold tokens are outside the kept set."""
    pre, ft, _ = planted_rows(60)
    labels = ft.argmin(-1)
    tokens = statistics(pre, ft, labels, Family("kl", 0.3, -5.0))
    curve = tokens.curve
    assert curve.minima().item() == pytest.approx(0.0, abs=1e-6)
    middle = int((curve.mus < 0).sum())
    left, right = curve.sums[:, middle, 1].sum(), curve.sums[:, middle + 1, 1].sum()
    assert left < -60 < 60 < right
    assert curve.scored.tolist() == [1] * 60
    assert tokens.coverage == 0


@pytest.mark.parametrize("family", [Family("kl", 0.1), Family("log_ratio", 0.0), Family("kl", 0.1, -1.0)], ids=str)
def test_many_data_are_read_once_after_a_first_part(family, monkeypatch):
    """The first part alone places the strengths; the minimum is exact all the same, and so where logits cannot be kept."""
    pre, ft, labels = planted_rows(1500, vocabulary=60)
    first, second, batches = planted(pre, ft, labels, 5)
    seen = []
    read = collection.batch_statistics
    monkeypatch.setattr(collection, "batch_statistics", lambda *a, **k: seen.append(read(*a, **k)) or seen[-1])
    for limit in (collection.KEPT_LOGITS, 0):
        monkeypatch.setattr(collection, "KEPT_LOGITS", limit)
        seen.clear()
        for data in (batches, iter(batches)):
            curve = collection.collect(second, data, [family], pretrained=first).curves[family]
            assert curve.minima().item() == pytest.approx(best_of_a_grid(pre, ft, labels, family), abs=1e-4)
            assert int(curve.gold.sum()) == 1500
        assert sum(int(part.gold.sum()) for part in seen) <= 2 * (512 + 20 + 2 * 1500)


def test_data_that_change_between_readings_are_an_error(monkeypatch):
    pre, ft, labels = planted_rows(40, vocabulary=60)
    first, second, batches = planted(pre, ft, labels, 5)

    class Shuffled(list):
        def __iter__(self):
            self.append(self.pop(0))
            return super().__iter__()

    monkeypatch.setattr(collection, "KEPT_LOGITS", 0)
    with pytest.raises(ValueError, match="data changed between two readings"):
        collection.collect(second, Shuffled(batches), [Family()], pretrained=first)


def test_memory_does_not_grow_with_the_kept_set():
    """Statistics of alpha = 0 take as much as those of alpha = 0.1, and so does what is saved."""
    pre, ft, labels = planted_rows(80)
    sizes = []
    for alpha in (0.0, 0.1):
        tokens = statistics(pre, ft, labels, Family("kl", alpha), length=8)
        sizes.append(tokens.bytes - tokens.curve.mus.nbytes * (1 + 3 * len(tokens.curve)))
    assert sizes[0] == sizes[1]
    assert len(tokens.curve.mus) < 60


def test_a_curve_between_its_points():
    """A polynomial of degree 5 is met exactly; beyond the grid the tangent goes on; the chord and the tangents hold it."""
    mus = torch.tensor([-2.0, -1.0, 0.0, 0.0, 1.5, 4.0], dtype=torch.float64)

    def values(mu):
        return torch.stack([mu**4 / 12 + mu**2 - mu, mu**3 / 3 + 2 * mu - 1, mu**2 + 2], -1)

    curve = NLLCurve(
        mus, values(mus)[None], torch.tensor([[-9.0, 9.0]]).double(), torch.ones(1).long(), torch.ones(1).long()
    )
    for mu in (-1.7, -0.2, 0.0, 0.3, 2.0, 3.9):
        assert curve.mean(mu) == pytest.approx(values(torch.tensor(mu, dtype=torch.float64))[0].item(), abs=1e-12)
    assert curve.mean(6.0) == pytest.approx((values(mus[-1])[0] + 2 * values(mus[-1])[1]).item())
    assert curve.minima().item() == pytest.approx(0.4798, abs=2e-3)  # of the cubic through slopes and curvatures
    sharp = torch.tensor(
        [[[8.0, -1.0, 0.0], [7.0, -1.0, 0.0], [6.0, -1.0, 900.0], [6.0, -1.0, 900.0], [9.0, 2.0, 0.0]]]
    )
    held = NLLCurve(mus[[0, 1, 2, 3, 4]], sharp.double(), curve.ends, curve.scored, curve.gold)
    for mu in torch.linspace(-1, 1.5, 26).tolist():
        assert (
            max(6 - mu, 9 - 2 * (1.5 - mu) if mu > 0 else 0) - 1e-9
            <= held.mean(mu)
            <= (6 + 2 * mu if mu > 0 else 6 - mu) + 1e-9
        )


@pytest.mark.parametrize(("mu", "rows"), [(MAX_STRENGTH, 1), (-MAX_STRENGTH, -1)])
def test_a_curve_that_falls_for_ever(mu, rows):
    pre, ft, _ = planted_rows(30)
    delta = svdecode.steering_vector(pre, ft, alpha=0.0, direction="log_ratio")
    labels = (rows * delta).argmax(-1)
    assert statistics(pre, ft, labels, Family("log_ratio", 0.0)).curve.minima().item() == mu


def test_logits_of_minus_infinity():
    """A masked gold token is not scored; a masked other token changes nothing, in either model."""
    pre, ft, labels = planted_rows(40)
    rows = torch.arange(40)
    masked = (labels + 1) % ft.shape[1]
    ft[rows, masked] = -math.inf
    pre[rows[20:], (labels[20:] + 2) % ft.shape[1]] = -math.inf
    ft[0, labels[0]] = -math.inf
    for family in (Family("kl", 0.0), Family("log_ratio", 0.0), Family("log_ratio", 0.1, -1.0)):
        mus = torch.tensor([-0.7, 0.0, 1.3], dtype=torch.float64)
        found = nll_of(rows_of(pre, ft, labels), family, mus)
        expected = svdecode.steered_nll(pre.double(), ft.double(), labels, mus, **family.keywords)
        assert found.scored.tolist() == [False] + [True] * 39
        torch.testing.assert_close(found.sums[1:, :, 0], expected[1:].double(), rtol=1e-5, atol=1e-5)
