"""Intervals of a calibration against brute force, its gains on fresh data, and what it says about them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svdecode.calibration.report import markdown, write_report
from svdecode.common.intervals import resamples
from svdecode.strength import bootstrap
from svdecode.strength.calibration import Calibration
from svdecode.strength.estimators import ESTIMATORS, exact
from svdecode.strength.family import MAX_STRENGTH
from svdecode.strength.nll_curve import NLLCurve
from svdecode.strength.token_statistics import TOKEN_BYTES, GoldTokens, TokenStatistics

GRID = torch.cat(
    [
        torch.tensor([-MAX_STRENGTH, -100.0, -30.0], dtype=torch.float64),
        torch.linspace(-10, 0, 61, dtype=torch.float64),
        torch.linspace(0, 10, 61, dtype=torch.float64),
        torch.tensor([30.0, 100.0, MAX_STRENGTH], dtype=torch.float64),
    ]
)


def statistics_of(scores: Tensor, deltas: Tensor, gold: Tensor, sequence: Tensor, **values: Tensor) -> TokenStatistics:
    """Of kept sets (N, W), -inf where a row has fewer, with gold tokens (N,), -1 where it is not kept, by the formulas."""
    kept, place = gold >= 0, gold.clamp(min=0)[:, None]
    there = scores > -math.inf
    relative = torch.where(there, deltas - deltas.gather(1, place), 0.0).double()
    steered = (scores - scores.gather(1, place)).double()[:, None] + GRID[None, :, None] * relative[:, None]
    weights = steered.softmax(-1)
    slope = (weights * relative[:, None]).sum(-1)
    curvature = (weights * (relative[:, None] - slope[..., None]).square()).sum(-1)
    found = torch.stack([steered.logsumexp(-1), slope, curvature], -1)
    ends = torch.stack(
        [relative.masked_fill(~there, math.inf).amin(1), relative.masked_fill(~there, -math.inf).amax(1)], 1
    )
    index = sequence.unique(return_inverse=True)[1]

    def summed(part: Tensor) -> Tensor:
        return part.new_zeros(int(index.max()) + 1, *part.shape[1:]).index_add_(0, index, part)

    found, ends = found.masked_fill(~kept[:, None, None], 0.0), ends.masked_fill(~kept[:, None], 0.0)
    curve = NLLCurve(GRID, summed(found), summed(ends), summed(kept.long()), summed(torch.ones_like(gold)))
    values = {
        "moments": torch.ones(len(gold), 3),
        "mu_star": torch.ones(len(gold)),
        "kl": torch.ones(len(gold)),
        **values,
    }
    return TokenStatistics(GoldTokens(**values, num_kept=there.sum(1).int(), kept=kept, sequence=sequence.int()), curve)


def synthetic(
    sequences: int, length: int = 4, *, best: float = 1.0, spread: float = 0.5, seed: int = 0, always: int = 0
) -> TokenStatistics:
    """Tokens of sequences whose gold tokens are drawn from the distribution steered with `best`; one in six is not kept.

    Tokens of one sequence share the sign of what their deltas miss: a bootstrap of tokens would be too sure. `always` 1 or -1:
    the gold token has the largest or the least delta.
    """
    draw = torch.Generator().manual_seed(seed)
    total = sequences * length
    counts = torch.randint(1, 8, (total,), generator=draw)
    sequence = torch.arange(total) // length
    scores, deltas = (torch.randn(total, 7, generator=draw) for _ in range(2))
    scores = scores.masked_fill(torch.arange(7) >= counts[:, None], -math.inf).log_softmax(-1)
    own = best + torch.randn(sequences, generator=draw)[sequence]
    noise = -torch.rand(total, 7, generator=draw).log().neg().log()
    gold = (scores + own[:, None] * spread * deltas + noise).argmax(1)
    gold = torch.where(torch.arange(total) % 6 == 5, -1, gold)
    if always:
        gold = (always * deltas).masked_fill(scores == -math.inf, -math.inf).argmax(1)
    moments = torch.randn(total, 3, generator=draw)
    moments[:, 1:] = moments[:, 1:].abs()
    return statistics_of(
        scores, (3 if always else spread) * deltas, gold, sequence * 3,  # numbers with gaps: some have no gold token
        moments=moments, mu_star=moments[:, 0] / moments[:, 1], kl=torch.rand(total, generator=draw),
    )  # fmt: skip


def drawn(tokens: TokenStatistics, chosen: list[int]) -> TokenStatistics:
    """The sequences of those indices, each as often as it stands there."""
    index = tokens.sequence_index()
    rows = [(index == i).nonzero().squeeze(1) for i in chosen]
    gold = tokens.gold.select(torch.cat(rows))
    gold.sequence = torch.cat([torch.full((len(row),), number) for number, row in enumerate(rows)]).int()
    return TokenStatistics(gold, tokens.curve.select(torch.tensor(chosen)))


def calibration(tokens: TokenStatistics, **more: object) -> Calibration:
    return Calibration.from_tokens(tokens, **{"estimator": "exact", "alpha": 0.1, "direction": "kl", **more})


@pytest.mark.parametrize(("sequences", "length"), [(3, 2), (25, 4)])
def test_draws_equal_the_estimators_on_resampled_sequences(sequences, length):
    tokens = synthetic(sequences, length)
    draws = bootstrap.bootstrap_estimates(tokens, seed=7, number=40)
    for index, chosen in enumerate(resamples(sequences, 7, 40).tolist()):
        again = drawn(tokens, chosen)
        for name, function in ESTIMATORS.items():
            assert draws[name][index].item() == pytest.approx(function(again), rel=1e-5, abs=1e-6, nan_ok=True), (
                name,
                index,
            )


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
    """Each answer nine times over tells no more; nine times as many answers do."""
    one = synthetic(40)
    low, high = bootstrap.interval(bootstrap.bootstrap_estimates(one)["exact"])
    longer = NLLCurve(GRID, 9 * one.curve.sums, 9 * one.curve.ends, 9 * one.curve.scored, 9 * one.curve.gold)
    again = bootstrap.interval(bootstrap.minima_draws(longer))
    assert again == pytest.approx((low, high), rel=1e-6)
    more = bootstrap.interval(bootstrap.minima_draws(one.curve.select(torch.arange(40).repeat(9))))
    assert more[1] - more[0] < 0.6 * (high - low)


def test_no_minimum_is_the_largest_strength():
    always = synthetic(30, always=1)  # slopes underflow long before mu = 1000
    assert exact(always) == MAX_STRENGTH
    assert bootstrap.bootstrap_estimates(always, number=20)["exact"].tolist() == [MAX_STRENGTH] * 20
    assert exact(synthetic(30, always=-1)) == -MAX_STRENGTH
    assert exact(synthetic(30, spread=0.0)) == 0.0


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
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    first, second = (drawn(tokens, half) for half in (order[:20], order[20:]))
    assert found["mus"] == pytest.approx([exact(first), exact(second)])
    judged = ((second, found["mus"][0]), (first, found["mus"][1]))
    total = sum((part.curve.at(0.0) - part.curve.at(mu)).sum().item() for part, mu in judged)
    assert found["gain"] == pytest.approx(total / int(tokens.curve.scored.sum()))


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
    curve = 24 * len(GRID) + 16 + 16  # sums, ends, counts of each sequence
    assert tokens.bytes == TOKEN_BYTES * len(tokens) + curve * 50 + 8 * len(GRID)
    assert calibration(tokens).bytes_per_token == tokens.bytes / len(tokens)
