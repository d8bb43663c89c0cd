"""Gradients on every backend against the float64 reference, whose own are proven by gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, Case, case_id
from rows import kept_labels, model_rows

import svdecode

FINITE = [case for case in CASES if math.prod(case.shape) and case.shape[-1] < 20000]


def assert_gradients_close(got, expected, terms=0.0):
    """1e-4 relative to the largest, or 1e-2 in a half dtype.

    Where the truth is near 0, terms cancel in float32. What is left over has the size of the other gradient, or of 0.1, or
    of four roundings of `terms`, the largest sum of magnitudes that an element is made of.
    """
    sizes = [e.abs().nan_to_num().amax().item() if e.numel() else 0.0 for e in expected]
    for g, e, size in zip(got, expected, sizes, strict=True):
        tolerance = 1e-2 if g.dtype in (torch.bfloat16, torch.float16) else 1e-4
        leftover = max(1e-7 * max(*sizes, 0.1), 4 * 2**-24 * terms)
        torch.testing.assert_close(g.double(), e.double(), rtol=tolerance, atol=tolerance * size + leftover)


def gradients(loss, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    value.backward()
    return [leaf.grad for leaf in leaves]


def steer_loss(labels, weights, case, own):
    def loss(pre, ft, mu):
        out = svdecode.fused_steer(pre, ft, None if own else mu, labels=labels, **case.settings)
        finite = out.logprobs > -math.inf
        value = (out.logprobs.masked_fill(~finite, 0.0) * weights.to(out.logprobs)).sum() + 0.3 * out.kl.sum()
        value = value + 0.1 * out.moments.sum() + 0.01 * out.mu_star.sum()
        return value + 0.0 * mu.sum()

    return loss


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("case", FINITE, ids=case_id)
def test_fused_steer(case, own, backend, device):
    pre, ft = case.logits(device)
    labels = case.labels(ft)
    weights = torch.randn(ft.shape, dtype=torch.float64, device=device)
    mu = torch.linspace(-0.5, 1.5, labels.numel(), device=device).reshape(labels.shape)
    loss = steer_loss(labels, weights, case, own)
    got = gradients(loss, pre, ft, mu)
    expected = gradients(loss, pre.double(), ft.double(), mu.double())
    assert expected[1].abs().sum() > 0 or case.shape[-1] == 1
    assert got[0].dtype == pre.dtype
    assert_gradients_close(got, expected)


@pytest.mark.parametrize("case", FINITE, ids=case_id)
def test_steered_nll(case, backend, device):
    pre, ft = case.logits(device)
    labels = case.labels(ft)
    mus = torch.tensor([-0.5, 0.8], device=device)
    weights = torch.randn((*labels.shape, 2), dtype=torch.float64, device=device)

    def loss(pre, ft, mus):
        nll = svdecode.steered_nll(pre, ft, labels, mus, **case.settings)
        return (nll.masked_fill(nll == math.inf, 0.0) * weights.to(nll)).sum()

    assert_gradients_close(gradients(loss, pre, ft, mus), gradients(loss, pre.double(), ft.double(), mus.double()))


@pytest.mark.parametrize("direction", ["kl", "log_ratio"])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_steering_vector_and_optimal_strength(direction, alpha, backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(3, 5000, spread=1.5))
    labels = kept_labels(ft)
    weights = torch.randn(ft.shape, dtype=torch.float64, device=device)

    def loss(pre, ft):
        delta = svdecode.steering_vector(pre, ft, alpha=alpha, direction=direction)
        mu_star, moments = svdecode.optimal_strength(pre, ft, labels, alpha=alpha, direction=direction)
        return (delta * weights.to(delta)).sum() + moments.sum() + 0.1 * mu_star.sum()

    assert_gradients_close(gradients(loss, pre, ft), gradients(loss, pre.double(), ft.double()))


@pytest.mark.parametrize("penalty", [-math.inf, -1.0])
def test_infinities_and_invalid_rows(penalty, backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(5, 700, spread=1.0))
    pre[0, 3] = ft[1, 4] = pre[1, 4] = ft[2, 6] = -math.inf
    pre[3, 0] = math.nan
    case = Case("", (5, 700), penalty=penalty)
    labels = torch.tensor([3, 4, 6, 7, 8], device=device)
    weights = torch.randn(5, 700, dtype=torch.float64, device=device)

    def loss(pre, ft):
        out = svdecode.fused_steer(pre, ft, 0.7, labels=labels, **case.settings)
        used = out.logprobs.isfinite()
        value = (out.logprobs.masked_fill(~used, 0.0) * weights.to(out.logprobs)).sum()
        return value + out.moments.nan_to_num().sum() + out.kl.masked_fill(~out.kl.isfinite(), 0.0).sum()

    got = gradients(loss, pre, ft)
    assert not any(g.isnan().any() for g in got)
    assert (got[0][3] == 0).all()
    assert_gradients_close(got, gradients(loss, pre.double(), ft.double()))


def test_only_what_is_needed(backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(2, 300))
    ft.requires_grad_()
    svdecode.fused_steer(pre, ft, 0.5, penalty=-1.0).logprobs[:, 3].sum().backward()
    assert pre.grad is None
    assert ft.grad.abs().sum() > 0
    pre.requires_grad_()
    ft = ft.detach()
    mus = torch.tensor([0.5], device=device, requires_grad=True)
    svdecode.steered_nll(pre, ft, ft.argmax(-1), mus).sum().backward()
    assert pre.grad.abs().sum() > 0
    assert mus.grad.abs().sum() > 0


def test_strided_gradients(backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(3, 4, 600))
    labels = kept_labels(ft)[:, 1:]

    def loss(pre, ft):
        out = svdecode.fused_steer(pre[:, :-1], ft[:, :-1], 0.7, penalty=-1.0).logprobs
        return -out.gather(-1, labels.clamp(min=0)[..., None]).mean() + out.transpose(0, 1)[1].mean()

    assert_gradients_close(gradients(loss, pre, ft), gradients(loss, pre.double(), ft.double()))
