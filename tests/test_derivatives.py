"""Second and forward-mode derivatives, and those of torch.func: on every backend those of the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from rows import model_rows
from torch.autograd import forward_ad

import svdecode
from svdecode.ops import torch_library

ROWS, VOCABULARY = 3, 13
LABELS = torch.tensor([2, -100, 7])


def logprobs(pre, ft, mu, **settings):
    return svdecode.fused_steer(pre, ft, mu[0], **settings).logprobs.clamp(min=-1e3)


def statistics(pre, ft, mu, **settings):
    """What `fused_steer` returns beside the log-probs, at each row's own strength."""
    out = svdecode.fused_steer(pre, ft, labels=LABELS, **settings)
    return torch.cat([out.mu[:, None], out.kl[:, None].clamp(max=1e3), out.mu_star[:, None], out.moments], -1)


def nll(pre, ft, mu, **settings):
    return svdecode.steered_nll(pre, ft, LABELS, mu, **settings).clamp(max=1e3)


def vector(pre, ft, mu, penalty, **settings):
    return svdecode.steering_vector(pre, ft, **settings)


def strength(pre, ft, mu, penalty, **settings):
    mu_star, moments = svdecode.optimal_strength(pre, ft, LABELS, **settings)
    return torch.cat([mu_star[:, None], moments], -1)


OPERATORS = {f.__name__: f for f in (logprobs, statistics, nll, vector, strength)}
SETTINGS = [
    {"alpha": 0.05, "penalty": -math.inf, "direction": "kl"},
    {"alpha": 0.2, "penalty": -0.7, "direction": "log_ratio"},
]


@pytest.fixture(params=SETTINGS, ids=lambda settings: settings["direction"])
def settings(request):
    return request.param


@pytest.fixture(params=OPERATORS)
def operator(request, settings):
    return lambda *inputs: OPERATORS[request.param](*inputs, **settings)


@pytest.fixture
def inputs():
    """Logits of two models and two strengths, float64, with one logit of -inf in each."""
    pre, ft = model_rows(ROWS, VOCABULARY, spread=0.7)
    pre[0, 3] = ft[1, 4] = -math.inf
    return pre, ft, torch.tensor([0.6, -0.4], dtype=torch.float64)


def directions(inputs):
    torch.manual_seed(1)
    return [torch.randn_like(x) for x in inputs]


def single(tensors):
    return [x.float() for x in tensors]


def close(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5 * max(1.0, expected.abs().max().item()))


def difference(f, inputs, along, step=1e-6):
    """Central finite difference of f at the inputs."""
    ahead, behind = (f(*(x + sign * step * v for x, v in zip(inputs, along, strict=True))) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


def pushed(f, inputs, along):
    """Forward-mode derivative by dual numbers."""
    with forward_ad.dual_level():
        dual = f(*(forward_ad.make_dual(x, v) for x, v in zip(inputs, along, strict=True)))
        return forward_ad.unpack_dual(dual).tangent


def gradient_along(f, inputs, weights, along):
    """<gradient of <weights, f>, along> as a function of the inputs; with a graph of its own."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad((f(*leaves) * weights).sum(), leaves, create_graph=True, allow_unused=True)
    return leaves, sum((g * v).sum() for g, v in zip(grads, along, strict=True) if g is not None)


def test_forward_mode(operator, inputs, backend):
    along = directions(inputs)
    expected = difference(operator, inputs, along)
    assert expected.abs().max() > 1e-2
    # The difference itself is good to about 1e-8; it can see errors of float32's size.
    close(pushed(operator, single(inputs), single(along)), expected)
    close(torch.func.jvp(operator, tuple(single(inputs)), tuple(single(along)))[1], expected)


def test_second_derivatives(operator, inputs, backend):
    along = directions(inputs)
    further = [v.flip(0) for v in along]
    weights = torch.randn_like(operator(*inputs))

    def slope(*at):
        return gradient_along(operator, at, weights, along)[1].detach()

    expected = difference(slope, inputs, further)
    leaves, value = gradient_along(operator, single(inputs), weights.float(), single(along))
    second = torch.autograd.grad(value, leaves, allow_unused=True)
    got = sum((g * v).sum() for g, v in zip(second, single(further), strict=True) if g is not None)
    assert expected.abs() > 1e-3
    close(got, expected)


def test_torch_func(operator, inputs, backend):
    weights = torch.randn_like(operator(*inputs))

    def loss(ft):
        return (operator(single(inputs)[0], ft, single(inputs)[2]) * weights.float()).sum()

    ft = single(inputs)[1]
    leaf = ft.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    close(torch.func.grad(loss)(ft), expected.double())
    rows = torch.autograd.functional.hessian(lambda ft: (operator(inputs[0], ft, inputs[2]) * weights).sum(), inputs[1])
    close(torch.func.hessian(loss)(ft), rows)


def test_a_gradient_for_each_sample(backend):
    pre, ft = (x.float() for x in model_rows(4, VOCABULARY, spread=0.7))

    def entropy(pre, ft):
        out = svdecode.fused_steer(pre, ft, 0.5, penalty=-1.0).logprobs
        return -(out.exp() * out).sum()

    leaf = ft.clone().requires_grad_()
    entropy(pre, leaf).backward()
    close(torch.func.vmap(torch.func.grad(entropy, argnums=1))(pre, ft), leaf.grad.double())


def test_the_kernels_still_compute_what_only_they_are_needed_for(backend, monkeypatch):
    """The reference is for second and forward-mode derivatives alone; a plain gradient takes the kernels."""
    for part, name in (
        (torch_library.reference, "fused_steer"),
        (torch_library.reference_backward, "fused_steer_backward"),
    ):
        monkeypatch.setattr(part, name, None)
    pre, ft = (x.float() for x in model_rows(2, VOCABULARY))
    ft.requires_grad_()
    svdecode.fused_steer(pre, ft, 0.5, penalty=-1.0).logprobs.square().sum().backward()
    assert ft.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="NoneType"):
        torch.autograd.grad(svdecode.fused_steer(pre, ft, 0.5).kl.sum(), ft, create_graph=True)
    with forward_ad.dual_level(), pytest.raises(TypeError, match="NoneType"):
        svdecode.fused_steer(pre, ft.detach(), 0.5)


def test_draws_have_no_derivative_in_either_mode(backend):
    pre, ft = (x.float() for x in model_rows(2, VOCABULARY))
    expected = svdecode.steer_topk(pre, ft, 0.5, k=3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(ft, torch.ones_like(ft))
        for got, plain in zip(svdecode.steer_topk(pre, dual, 0.5, k=3), expected, strict=True):
            assert torch.equal(got, plain)


def test_out_is_refused_in_forward_mode(backend):
    pre, ft = (x.float() for x in model_rows(2, VOCABULARY))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode derivatives: leave out= away"):
        svdecode.fused_steer(pre, ft, 0.5, out=torch.empty(2, VOCABULARY))
