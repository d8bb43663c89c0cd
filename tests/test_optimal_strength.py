"""optimal_strength on every backend, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, assert_scalars_close, case_id
from rows import INVALID, edge_rows, model_rows

import svdecode


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_cases(case, backend, device):
    pre, ft = case.logits(device)
    labels = case.labels(ft)
    settings = {"alpha": case.alpha, "direction": case.direction}
    mu_star, moments = svdecode.optimal_strength(pre, ft, labels, **settings)
    expected_star, expected = svdecode.optimal_strength(pre.double(), ft.double(), labels, **settings)
    assert_scalars_close(moments, expected, "moments")
    assert_scalars_close(mu_star, expected_star, "mu_star")
    assert (mu_star.dtype, moments.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("direction", ["kl", "log_ratio"])
@pytest.mark.parametrize("name", edge_rows())
def test_edges(name, direction, backend, device):
    pre, ft = (x.float().to(device) for x in edge_rows()[name])
    labels = torch.tensor([4], device=device)
    mu_star, moments = svdecode.optimal_strength(pre, ft, labels, alpha=0.05, direction=direction)
    expected_star, expected = svdecode.optimal_strength(
        pre.double(), ft.double(), labels, alpha=0.05, direction=direction
    )
    assert_scalars_close(moments, expected)
    assert_scalars_close(mu_star, expected_star)
    assert moments.isnan().all() == (name in INVALID)


@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.001])
def test_a_top_token_that_the_pretrained_model_excludes_has_no_delta(alpha, backend, device):
    """method.md, section 3: its delta is 0. With K = {top token}, N = D = H = 0 and so is mu*."""
    pre = torch.tensor([-math.inf, 0.3, 1.0, -0.7], device=device)
    ft = torch.tensor([6.0, 0.0, 1.5, 2.0], device=device)
    label = torch.tensor(1, device=device)
    has = pre > -math.inf
    p = torch.softmax(ft.double(), -1)
    d = torch.where(has, ft.double() - torch.where(has, pre, 0.0), 0.0)
    delta = torch.where(has, p * (d - (p * d).sum()), 0.0)
    delta = torch.where(ft >= ft.max() + math.log(alpha), delta, 0.0)
    mean = (p * delta).sum()
    expected = torch.stack([delta[1] - mean, delta.square().sum(), (p * delta.square()).sum() - mean.square()])
    for dtype in (torch.float32, torch.float64):  # float64 is the reference
        got, moments = svdecode.optimal_strength(pre.to(dtype), ft.to(dtype), label, alpha=alpha)
        assert_scalars_close(moments, expected)
        assert_scalars_close(got, expected[0] / (expected[1] + 1e-12))


@pytest.mark.parametrize("margin", [2.0, 8.0, 14.0])
def test_a_model_that_is_sure_of_itself(margin, backend, device):
    """p of the top token within 1e-6 of 1: N, D and H are tiny, and a plain fp32 sum would have no digit of them right."""
    pre, ft = model_rows(4, 3000, dtype=torch.float32, spread=1.0)
    ft[:, 7] = ft.amax(-1) + margin
    pre[:, 7] = pre.amax(-1) + margin - 0.5
    pre, ft = pre.to(device), ft.to(device)
    labels = torch.full((4,), 7, device=device)
    for direction in ("kl", "log_ratio"):
        got, moments = svdecode.optimal_strength(pre, ft, labels, alpha=0.0, direction=direction)
        expected, truth = svdecode.optimal_strength(pre.double(), ft.double(), labels, alpha=0.0, direction=direction)
        assert_scalars_close(got, expected)
        torch.testing.assert_close(moments.double(), truth, rtol=1e-4, atol=1e-18)
