"""What steering is worth in steps: on curves whose answer is known, and never beyond them."""

from __future__ import annotations

import math

import pytest
import torch

from svdecode.strength.worth import equivalent_steps, worth_text, worths

STEPS = [10, 20, 40, 80]


def line(step: float) -> float:
    """An NLL that is linear in log(1 + steps)."""
    return 5.0 - math.log1p(step)


def same(nll: float, sequences: int = 30) -> torch.Tensor:
    """(S, 2): each sequence has the same mean NLL, over a number of tokens of its own."""
    tokens = torch.arange(1, sequences + 1, dtype=torch.float64)
    return torch.stack([nll * tokens, tokens], 1)


def test_a_curve_with_a_known_answer():
    """The steered checkpoints have the NLL of 15, 30, 79 and 80 steps."""
    found = worths(STEPS, [same(line(step)) for step in STEPS], [same(line(step)) for step in (15, 30, 79, 80)])
    for row, steps in zip(found, (15, 30, 79, 80), strict=True):
        assert row["steps"] == pytest.approx(steps)
        assert row["interval"] == pytest.approx([steps, steps])  # the sequences agree
    assert found[0]["text"] == "15.0 [15.0, 15.0]"


def test_no_steering_is_worth_its_own_steps():
    """Whatever the sequences are: the interval is paired, and has no width."""
    draw = torch.Generator().manual_seed(0)
    warm = [torch.stack([line(s) + torch.rand(25, generator=draw), torch.ones(25)], 1).double() for s in STEPS]
    for row, step in zip(worths(STEPS, warm, warm), STEPS, strict=True):
        assert row["steps"] == pytest.approx(step)
        assert row["interval"] == pytest.approx([step, step])


def test_nothing_is_read_off_beyond_the_curve():
    warm = [same(line(step)) for step in STEPS]
    steered = [same(value) for value in (line(9), line(20), line(80) - 1e-6, 0.0)]
    found = worths(STEPS, warm, steered)
    assert [row["steps"] for row in found] == [0.0, pytest.approx(20), math.inf, math.inf]
    assert found[0]["text"] == "fewer than 10 [fewer than 10, fewer than 10]"
    assert found[3]["text"] == "more than 80 [more than 80, more than 80]"


def test_an_end_of_the_interval_may_lie_beyond():
    """Half of the sequences gain what 40 steps gain and half far more: some draws reach past the last checkpoint."""
    warm = [same(line(step), 12) for step in STEPS]
    tokens = warm[0][:, 1]
    gains = torch.where(torch.arange(12) % 2 == 0, 0.0, -1.6)
    steered = [torch.stack([(line(40) + gains) * tokens, tokens], 1)] * 4
    row = worths(STEPS, warm, steered)[2]
    low, high = row["interval"]
    assert 40 <= low < 80
    assert high == math.inf
    assert row["text"].endswith(", more than 80]")
    assert not any(math.isnan(end) for end in (low, high, row["steps"]))


def test_the_interval_pairs_checkpoints_and_weighs_tokens():
    """Sequences differ by 3 nats and tokens by a factor of 20, which moves curve and target together."""
    draw = torch.Generator().manual_seed(1)
    level, tokens = (
        3 * torch.rand(60, generator=draw).double(),
        1 + 20 * torch.rand(60, generator=draw).double().round(),
    )

    def at(step: float) -> torch.Tensor:
        return torch.stack([(line(step) + level) * tokens, tokens], 1)

    (row, *_) = worths(STEPS, [at(step) for step in STEPS], [at(25)] * 4)
    assert row["steps"] == pytest.approx(25)
    assert row["interval"] == pytest.approx([25, 25])
    noise = 0.3 * torch.randn(60, generator=draw).double() * tokens
    noisy = at(25)
    noisy[:, 0] += noise - noise.mean()
    low, high = worths(STEPS, [at(step) for step in STEPS], [noisy] * 4)[0]["interval"]
    assert 18 < low < 25 < high < 35


def test_the_fewest_steps_where_training_went_too_far():
    """The NLL rises again after 40 steps: what 80 steps have, fewer had before."""
    curve = torch.tensor([[3.0, 2.0, 1.0, 1.5]], dtype=torch.float64)
    at = torch.tensor(STEPS, dtype=torch.float64)
    found = equivalent_steps(at, curve, torch.tensor([1.5]).double()).item()
    assert found == pytest.approx(math.expm1((math.log1p(20) + math.log1p(40)) / 2))
    assert equivalent_steps(at, curve, torch.tensor([0.99]).double()).item() == math.inf


def test_one_checkpoint_and_one_sequence():
    (row,) = worths([12], [same(2.0)], [same(1.5)])
    assert row["text"] == "more than 12 [more than 12, more than 12]"
    (row,) = worths([12], [same(2.0, 1)], [same(2.0, 1)])
    assert row == {"steps": 12.0, "interval": None, "text": "12.0"}


def test_words():
    assert worth_text(20.44, [18.9, math.inf], [12, 48]) == "20.4 [18.9, more than 48]"
    assert worth_text(153.6, [0.0, 310.2], [12, 480]) == "154 [fewer than 12, 310]"
