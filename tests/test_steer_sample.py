"""steer_sample on every backend: the reference's token at the same uniform number, and the right distribution."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, case_id, strength
from draws import assert_same_draw, draw
from rows import INVALID, edge_rows, model_rows

import svdecode


@pytest.mark.parametrize("mu", ["number", "rows"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_greedy_and_sampling(case, mu, backend, device):
    pre, ft = case.logits(device)
    mu = strength(mu, case, device)
    uniform = torch.rand(case.shape[:-1], device=device)
    greedy = dict(temperature=0.0, **case.settings)
    got, expected = draw(pre, ft, mu, uniform, backend, **greedy)
    steered = svdecode.fused_steer(pre.double(), ft.double(), mu, **case.settings).logprobs
    if steered.numel():
        best = steered.gather(-1, got[0][..., None]).squeeze(-1)
        torch.testing.assert_close(best, steered.amax(-1), rtol=0, atol=1e-6)
        assert (got[0] == expected[0]).double().mean() > 0.6  # the rest are ties within rounding
    for rest in ({"temperature": 0.7}, {"temperature": 1.5}):
        rest = {**rest, **case.settings}
        assert_same_draw(*draw(pre, ft, mu, uniform, backend, **rest), pre, ft, mu, uniform, rest)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9}, {"top_k": 1}])
@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.1, "penalty": -math.inf, "direction": "kl"},
        {"alpha": 0.0, "penalty": -math.inf, "direction": "log_ratio"},
        {"alpha": 0.1, "penalty": -1.0, "direction": "kl"},
    ],
)
def test_truncation(options, settings, backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(3, 4500, spread=1.5))
    uniform = torch.rand(3, device=device)
    rest = {"temperature": 1.2, **options, **settings}
    assert_same_draw(*draw(pre, ft, 0.8, uniform, backend, **rest), pre, ft, 0.8, uniform, rest)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.2}])
@pytest.mark.parametrize(("direction", "mu"), [("kl", 0.8), ("log_ratio", -1.0)])
def test_the_oracle_allows_a_tie_in_another_order_and_nothing_else(direction, mu, options):
    pre, ft = torch.tensor([[1.0, 1.0, 0.5]]), torch.tensor([[2.0, 2.0, 1.5]])
    rest = {"temperature": 1.0, "alpha": 0.0, "penalty": -math.inf, "direction": direction, **options}
    uniform = torch.tensor([0.3])
    (first, logprobs), expected = draw(pre, ft, mu, uniform, "reference", **rest)
    assert first.tolist() == [0]
    assert_same_draw((first + 1, logprobs), expected, pre, ft, mu, uniform, rest)
    with pytest.raises(AssertionError):
        assert_same_draw((first + 2, logprobs), expected, pre, ft, mu, uniform, rest)


@pytest.mark.parametrize("name", edge_rows())
def test_edges(name, backend, device):
    pre, ft = (x.float().to(device) for x in edge_rows()[name])
    for temperature in (0.0, 1.0):
        tokens, logprobs = svdecode.steer_sample(pre, ft, 1.5, temperature=temperature, top_k=3, top_p=0.9)
        if name in INVALID:
            assert tokens.tolist() == [-1]
            assert logprobs.isnan().all()
        else:
            assert ft[0, tokens.item()] > -math.inf
            assert logprobs.isfinite().all()


def test_ties_go_to_the_lowest_id_across_tiles_and_splits(backend, device):
    ft = torch.zeros(1, 9000, device=device)
    ft[0, [700, 5000, 8999]] = 5.0
    pre = torch.zeros_like(ft)
    assert svdecode.steer_sample(pre, ft, 0.0, temperature=0.0)[0].item() == 700
    assert svdecode.steer_sample(pre, torch.zeros_like(ft), 0.0, temperature=0.0, alpha=0.0)[0].item() == 0


def test_greedy_finds_a_token_outside_the_kept_set(backend, device):
    """A penalty of 0 and a strength that pushes the only kept token down: the best token is outside K."""
    ft = torch.zeros(1, 5000, device=device)
    ft[0, 3], ft[0, 4800] = 4.0, 1.0
    pre = ft.clone()
    pre[0, 3] = 6.0
    tokens, _ = svdecode.steer_sample(pre, ft, 200.0, temperature=0.0, penalty=0.0, direction="log_ratio", alpha=0.9)
    assert tokens.item() == 4800


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_changes_no_draw(dtype, backend, device):
    """Libraries set it while they build a model; there are only 256 bfloat16 numbers in [1/2, 1)."""
    zeros = torch.zeros(200, 600, device=device)

    def drawn():
        generator = torch.Generator(device).manual_seed(5)
        return svdecode.steer_sample(zeros, zeros, 0.3, alpha=0.0, generator=generator)

    expected = drawn()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = drawn()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert expected[0].unique().numel() > 150


def test_reproducible_and_distributed_as_it_should_be(backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(1, 40, spread=1.5))
    probabilities = svdecode.fused_steer(pre.double(), ft.double(), 0.8, alpha=0.02).logprobs.exp()[0]
    many = pre.expand(150, 40), ft.expand(150, 40)  # rows of stride 0
    first, second = (
        svdecode.steer_sample(*many, 0.8, alpha=0.02, generator=torch.Generator(device).manual_seed(3))[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)
    counts = torch.bincount(first, minlength=40).double()
    expected = probabilities * 150
    used = expected > 4
    chi2 = ((counts - expected)[used].square() / expected[used]).sum()
    assert chi2 < 3 * used.sum() + 10
    assert (counts[probabilities == 0] == 0).all()
