"""Intervals of a calibration against brute force, its gains on fresh data, and what it says about them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from svdecode.calibration.report import markdown, write_report
from svdecode.common.intervals import resamples
from svdecode.strength import bootstrap
from svdecode.strength.calibration import Calibration
from svdecode.strength.estimators import ESTIMATORS, MAX_STRENGTH, exact
from svdecode.strength.token_statistics import FIXED_BYTES, KEPT_BYTES, TokenStatistics


def synthetic(
    sequences: int, length: int = 4, *, best: float = 1.0, spread: float = 0.5, seed: int = 0
) -> TokenStatistics:
    """Tokens of sequences whose gold tokens are drawn from the distribution steered with `best`; one in six is not kept.

    Tokens of one sequence share the sign of what their deltas miss: a bootstrap of tokens would be too sure.
    """
    draw = torch.Generator().manual_seed(seed)
    total = sequences * length
    counts = torch.randint(1, 8, (total,), generator=draw)
    offsets = counts.cumsum(0) - counts
    row = torch.repeat_interleave(torch.arange(total), counts)
    sequence = torch.arange(total) // length
    scores, deltas = (torch.randn(len(row), generator=draw) for _ in range(2))
    logprobs = scores - torch.zeros(total).index_add_(0, row, scores.exp()).log()[row]
    own = best + torch.randn(sequences, generator=draw)[sequence]
    noise = -torch.rand(len(row), generator=draw).log().neg().log()
    steered = logprobs + own[row] * spread * deltas + noise
    top = torch.full((total,), -math.inf).scatter_reduce_(0, row, steered, "amax")
    gold = torch.where(torch.arange(total) % 6 == 5, -1, (steered >= top[row]).nonzero().squeeze(-1))
    moments = torch.randn(total, 3, generator=draw)
    moments[:, 1:] = moments[:, 1:].abs()
    return TokenStatistics(
        moments=moments,
        mu_star=moments[:, 0] / moments[:, 1],
        kl=torch.rand(total, generator=draw),
        num_kept=counts.int(),
        logprobs=logprobs,
        deltas=spread * deltas,
        gold=gold,
        offsets=offsets,
        sequence=sequence.int() * 3,  # numbers with gaps: some examples have no gold token
    )


def calibration(tokens: TokenStatistics, **more: object) -> Calibration:
    return Calibration.from_tokens(tokens, **{"estimator": "exact", "alpha": 0.1, "direction": "kl", **more})


@pytest.mark.parametrize(("sequences", "length"), [(3, 2), (25, 4)])
def test_draws_equal_the_estimators_on_resampled_sequences(sequences, length):
    tokens = synthetic(sequences, length)
    draws = bootstrap.bootstrap_estimates(tokens, seed=7, number=40)
    for index, chosen in enumerate(resamples(sequences, 7, 40).tolist()):
        rows = torch.cat([torch.arange(length) + length * i for i in chosen])
        again = tokens.select(rows)
        for name, function in ESTIMATORS.items():
            expected = function(again) if again.covered.any() or name != "exact" else math.nan
            assert draws[name][index].item() == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True), (name, index)


def test_blocks_of_draws_do_not_change_sums(monkeypatch):
    tokens = synthetic(10)
    monkeypatch.setattr(bootstrap, "_BLOCK", 10 * 40 * 3)  # a few draws at a time
    draws = bootstrap.bootstrap_estimates(tokens, number=200)
    assert all(len(values) == 200 for values in draws.values())
    assert len(draws["mean"].unique()) > 150  # no block repeats another


def test_intervals_hold_what_they_say():
    """Of 25 data sets from the same source, about 95% of the intervals of `exact` hold the value of a very large one."""
    truth = exact(synthetic(20_000, seed=1000))
    held = 0
    for seed in range(25):
        low, high = bootstrap.interval(bootstrap.bootstrap_estimates(synthetic(40, seed=seed), number=200)["exact"])
        held += low <= truth <= high
    assert 20 <= held <= 25


def test_sequences_and_not_tokens_are_resampled():
    one, doubled = synthetic(40), synthetic(40)
    copies = torch.arange(len(one)).repeat_interleave(9)  # each answer nine times over: no more is known
    low, high = bootstrap.interval(bootstrap.bootstrap_estimates(one)["exact"])
    again = bootstrap.interval(bootstrap.bootstrap_estimates(doubled.select(copies))["exact"])
    assert again == pytest.approx((low, high), rel=1e-3)
    as_tokens = dataclasses.replace(doubled.select(copies), sequence=torch.arange(len(copies)).int())
    wrong = bootstrap.interval(bootstrap.bootstrap_estimates(as_tokens)["exact"])
    assert wrong[1] - wrong[0] < 0.6 * (high - low)


def test_no_minimum_is_the_largest_strength():
    tokens = synthetic(30)
    largest = torch.full((len(tokens),), -math.inf)
    row = torch.repeat_interleave(torch.arange(len(tokens)), tokens.counts())
    largest.scatter_reduce_(0, row, tokens.deltas, "amax")
    best = (tokens.deltas == largest[row]).nonzero().squeeze(-1)
    always = dataclasses.replace(tokens, gold=best, deltas=3 * tokens.deltas)  # slopes underflow long before mu = 1000
    assert exact(always) == MAX_STRENGTH
    assert bootstrap.bootstrap_estimates(always, number=20)["exact"].tolist() == [MAX_STRENGTH] * 20
    assert exact(dataclasses.replace(always, deltas=-always.deltas)) == -MAX_STRENGTH
    assert exact(dataclasses.replace(always, deltas=torch.ones_like(always.deltas))) == 0.0


def test_gains_and_verdicts():
    useful = calibration(synthetic(200, best=3.0), held_out=synthetic(150, best=3.0, seed=5))
    for which in ("calibration", "held_out"):
        found = useful.gains[which]
        assert found["gain"] == pytest.approx(found["nll_at_0"] - found["nll_at_mu"])
        assert 0 < found["interval"][0] < found["gain"] < found["interval"][1]
    assert useful.verdict().startswith("A gain is shown on held-out data")

    useless = calibration(synthetic(200, best=0.0))
    assert useless.gains["calibration"]["gain"] >= 0  # by construction
    crossed = useless.gains["cross_fitted"]
    assert crossed["interval"][0] <= 0 <= crossed["interval"][1]
    assert "No gain is shown by cross-fitting" in useless.verdict()
    assert "which contains 0" in useless.verdict()

    harmful = calibration(synthetic(200, best=3.0), held_out=synthetic(150, best=-3.0, seed=5))
    assert harmful.verdict().startswith("Steering makes it worse on held-out data")
    assert harmful.gains["held_out"]["interval"][1] < 0

    single = calibration(synthetic(1, length=30))
    assert single.intervals == {}
    assert "not known" in single.verdict()


def test_cross_fitting_never_judges_a_token_by_its_own_strength():
    tokens = synthetic(40)
    found = bootstrap.cross_fitted_gain(tokens, "exact", seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    halves = [torch.isin(tokens.sequence // 3, half) for half in (order[:20], order[20:])]
    assert found["mus"] == [exact(tokens.select(half)) for half in halves]
    gains = [tokens.select(halves[1 - i]) for i in (0, 1)]
    total = sum((part.nll(0.0) - part.nll(mu)).sum() for part, mu in zip(gains, found["mus"], strict=True))
    assert found["gain"] == pytest.approx(total.item() / int(tokens.covered.sum()))


def test_report_and_figure(tmp_path):
    found = calibration(synthetic(60), held_out=synthetic(40, seed=9))
    path = write_report(found, tmp_path, figure=tmp_path / "c.png")
    text = path.read_text()
    assert found.verdict() in text
    assert "](c.png)" in text
    assert f"| **exact** | {found.mu:.4f} | [{found.intervals['exact'][0]:.4f}, " in text
    assert all(f"| {name} " in text or f"**{name}**" in text for name in ESTIMATORS)
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    found.save_pretrained(tmp_path)
    again = Calibration.from_pretrained(tmp_path)
    assert markdown(again, "c.png") == text
    again.plot(tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_bytes_are_as_stated():
    tokens = synthetic(50)
    assert tokens.bytes == FIXED_BYTES * len(tokens) + KEPT_BYTES * len(tokens.logprobs)
    assert calibration(tokens).bytes_per_token == tokens.bytes / len(tokens)
