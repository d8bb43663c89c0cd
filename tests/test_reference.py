"""The reference against mathematics: explicit Jacobians, autograd, dense grids, and the paper's printed algorithm."""

from __future__ import annotations

import math

import pytest
import torch
from rows import INVALID, edge_rows, kept_labels, model_rows
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

import svdecode
from svdecode.ops import reference

V = 50


def kl_of(pre, z):
    return (torch.softmax(z, -1) * (torch.log_softmax(z, -1) - torch.log_softmax(pre, -1))).sum()


def test_steering_vector_is_the_explicit_jacobian_times_the_kl_gradient():
    pre, ft = model_rows(V)
    p = torch.softmax(ft, -1)
    explicit_jacobian = torch.diag(p) - torch.outer(p, p)  # V x V
    q = p.clone().requires_grad_()
    kl_gradient = torch.autograd.grad((q * (q.log() - torch.log_softmax(pre, -1))).sum(), q)[0]
    delta = svdecode.steering_vector(pre, ft)
    torch.testing.assert_close(delta, explicit_jacobian @ kl_gradient, rtol=1e-12, atol=1e-15)
    # ... which is also the gradient of the KL in the logits: it points from the pre-trained model to the task
    torch.testing.assert_close(delta, jacobian(lambda z: kl_of(pre, z), ft), rtol=1e-10, atol=1e-14)
    assert abs(delta.sum()) < 1e-14


def test_log_ratio_direction_is_the_peers_rule_up_to_a_constant():
    pre, ft = model_rows(5, V)
    mu = 0.7
    out = svdecode.fused_steer(pre, ft, mu, alpha=0.0, direction="log_ratio")
    torch.testing.assert_close(out.logprobs, torch.log_softmax(ft + mu * (ft - pre), -1))


def test_kl_and_num_kept_and_logprobs_from_their_definitions():
    pre, ft = model_rows(4, V)
    out = svdecode.fused_steer(pre, ft, 0.8, alpha=0.2, penalty=-1.5)
    p = torch.softmax(ft, -1)
    kept = p >= 0.2 * p.amax(-1, keepdim=True)
    delta = svdecode.steering_vector(pre, ft)
    zs = torch.where(kept, ft + 0.8 * delta, ft - 0.8 * 1.5)
    torch.testing.assert_close(out.logprobs, zs - torch.logsumexp(zs, -1, keepdim=True))
    torch.testing.assert_close(out.kl, torch.stack([kl_of(a, z) for a, z in zip(pre, ft, strict=True)]))
    assert out.num_kept.tolist() == kept.sum(-1).tolist()
    assert out.num_kept.dtype == torch.int32


def test_the_papers_printed_orientation_gives_equal_steered_logits():
    """Algorithm 1 and 2 with the sign as printed: the strength comes out negative, the product is the same."""
    pre, ft = model_rows(6, V)
    labels = ft.argmax(-1)
    p, p_pre = torch.softmax(ft, -1), torch.softmax(pre, -1)
    for row in range(6):
        jac = torch.diag(p[row]) - torch.outer(p[row], p[row])
        printed = jac @ (-(p[row] / p_pre[row]).log() - 1)  # Eq. 10 as printed
        kept = p[row] >= 0.1 * p[row].max()
        masked = torch.where(kept, printed, 0.0)
        e_y = torch.nn.functional.one_hot(labels[row], V)
        printed_mu = ((e_y - p[row]) * masked).sum() / (masked.square().sum() + 1e-12)
        ours = svdecode.fused_steer(pre[row], ft[row], labels=labels[row])
        torch.testing.assert_close(ours.mu, -printed_mu)
        zs = torch.where(kept, ft[row] + printed_mu * printed, -math.inf)
        torch.testing.assert_close(ours.logprobs, torch.log_softmax(zs, -1))


def nll_of_untruncated(pre, ft, label, mu, direction="kl"):
    return -torch.log_softmax(ft + mu * svdecode.steering_vector(pre, ft, direction=direction), -1)[label]


@pytest.mark.parametrize("direction", ["kl", "log_ratio"])
def test_moments_are_the_derivatives_of_the_nll_in_mu(direction):
    pre, ft = model_rows(V)
    label = ft.topk(3).indices[2]
    mu = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = nll_of_untruncated(pre, ft, label, mu, direction)
    (first,) = torch.autograd.grad(loss, mu, create_graph=True)
    (second,) = torch.autograd.grad(first, mu)
    _, (n, d, h) = svdecode.optimal_strength(pre, ft, label, alpha=0.0, direction=direction)
    torch.testing.assert_close(n, -first.detach())
    torch.testing.assert_close(h, second)
    torch.testing.assert_close(d, svdecode.steering_vector(pre, ft, direction=direction).square().sum())
    assert not torch.isclose(d, h)


def test_truncated_moments_sum_over_the_kept_tokens_only():
    pre, ft = model_rows(V, spread=1.0)
    delta = svdecode.steering_vector(pre, ft)
    p = torch.softmax(ft, -1)
    kept = p >= 0.1 * p.max()
    assert 1 < kept.sum() < V
    mean = (p * delta)[kept].sum()
    for label in (p.argmax(), p.argmin()):
        mu_star, (n, d, h) = svdecode.optimal_strength(pre, ft, label)
        torch.testing.assert_close(n, (delta[label] if kept[label] else 0.0) - mean)
        torch.testing.assert_close(d, delta[kept].square().sum())
        torch.testing.assert_close(h, (p * delta.square())[kept].sum() - mean.square())
        torch.testing.assert_close(mu_star, n / (d + 1e-12))


def test_steered_nll_is_the_negated_logprob_and_convex():
    pre, ft = model_rows(7, V)
    labels = kept_labels(ft)
    mus = torch.linspace(-4, 4, 17, dtype=torch.float64)
    nll = svdecode.steered_nll(pre, ft, labels, mus, penalty=-2.0)
    for m, mu in enumerate(mus):
        logprobs = svdecode.fused_steer(pre, ft, mu, penalty=-2.0).logprobs
        expected = -logprobs.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
        torch.testing.assert_close(nll[:, m], torch.where(labels < 0, 0.0, expected))
    untruncated = svdecode.steered_nll(pre, ft, labels, mus, alpha=0.0)
    assert (untruncated[:, 2:] - 2 * untruncated[:, 1:-1] + untruncated[:, :-2] > -1e-12).all()


def test_strength_defaults():
    pre, ft = model_rows(4, V)
    labels = kept_labels(ft)
    torch.testing.assert_close(svdecode.fused_steer(pre, ft).logprobs, svdecode.fused_steer(pre, ft, 1.0).logprobs)
    out = svdecode.fused_steer(pre, ft, labels=labels)
    torch.testing.assert_close(out.mu, out.mu_star)
    torch.testing.assert_close(out.logprobs, svdecode.fused_steer(pre, ft, out.mu_star).logprobs)
    assert svdecode.fused_steer(pre, ft).mu_star is None
    assert svdecode.fused_steer(pre, ft, return_kl=False).kl is None


def test_mu_zero_leaves_the_model_and_truncates_with_minus_infinity():
    pre, ft = model_rows(V)
    torch.testing.assert_close(svdecode.fused_steer(pre, ft, 0.0, penalty=-3.0).logprobs, torch.log_softmax(ft, -1))
    kept = svdecode.fused_steer(pre, ft, 0.0)
    assert (kept.logprobs > -math.inf).sum() == kept.num_kept < V


@pytest.mark.parametrize("name", edge_rows())
def test_edges(name):
    pre, ft = edge_rows()[name]
    labels = torch.tensor([4])
    out = svdecode.fused_steer(pre, ft, 1.5, labels=labels, alpha=0.05, penalty=-1.0)
    if name in INVALID:
        for value in (out.logprobs, out.mu, out.kl, out.mu_star, out.moments):
            assert value.isnan().all()
        assert out.num_kept.item() == 0
        tokens, logprobs = svdecode.steer_sample(pre, ft)
        assert tokens.tolist() == [-1]
        assert logprobs.isnan().all()
        assert svdecode.steering_vector(pre, ft).isnan().all()
        assert svdecode.steered_nll(pre, ft, labels, pre.new_tensor([0.0, 1.0])).isnan().all()
        return
    assert not out.logprobs.isnan().any()
    assert not out.moments.isnan().any()
    torch.testing.assert_close(out.logprobs.exp().sum(-1), torch.ones(1, dtype=pre.dtype))
    assert (out.logprobs[ft == -math.inf] == -math.inf).all()
    assert (out.kl >= 0).all()
    assert ((out.kl == math.inf) == ((pre == -math.inf) & (ft > -math.inf)).any(-1)).all()
    delta = svdecode.steering_vector(pre, ft, direction="log_ratio")
    assert (delta[(ft == -math.inf) | (pre == -math.inf)] == 0).all()
    if name == "ties":
        assert svdecode.fused_steer(pre, ft, alpha=1.0).num_kept.item() == 3
        assert svdecode.steer_sample(pre, ft, 0.0, temperature=0.0)[0].item() == 0


def test_a_bad_row_leaves_the_others_alone():
    pre, ft = model_rows(3, V)
    alone = svdecode.fused_steer(pre, ft, 0.5)
    pre[1, 3] = math.nan
    out = svdecode.fused_steer(pre, ft, 0.5)
    assert out.logprobs[1].isnan().all()
    torch.testing.assert_close(out.logprobs[[0, 2]], alone.logprobs[[0, 2]], rtol=0, atol=0)


def test_ignored_labels():
    pre, ft = model_rows(2, V)
    out = svdecode.fused_steer(pre, ft, labels=torch.tensor([-100, 1]), eps=0.0)
    assert out.mu_star[0] == 0
    assert out.moments[0].tolist() == [0, 0, 0]
    assert out.mu[0] == 0
    assert svdecode.steered_nll(pre, ft, torch.tensor([-100, 1]), pre.new_ones(1))[0] == 0


# gradients ---------------------------------------------------------------------------------------------------------------

SETTINGS = [
    dict(alpha=0.1, penalty=-2.0, direction="kl"),
    dict(alpha=0.1, penalty=-2.0, direction="log_ratio"),
    dict(alpha=0.0, penalty=-math.inf, direction="kl"),
    dict(alpha=0.0, penalty=0.0, direction="log_ratio"),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("strength", ["tensor", "label"])
def test_gradcheck_fused_steer(settings, strength):
    pre, ft = (x.requires_grad_() for x in model_rows(2, 3, 9, spread=1.0))
    labels = kept_labels(ft.detach())
    mu = torch.randn(3, dtype=torch.float64, requires_grad=True) if strength == "tensor" else None

    def outputs(pre, ft, mu):
        out = svdecode.fused_steer(pre, ft, mu, labels=labels, **settings)
        return out.logprobs, out.mu, out.kl, out.mu_star, out.moments

    assert gradcheck(outputs, (pre, ft, mu))


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradcheck_the_rest(settings):
    pre, ft = (x.requires_grad_() for x in model_rows(3, 9, spread=1.0))
    labels = torch.tensor([1, -100, 4])
    mus = torch.tensor([-0.5, 0.8], dtype=torch.float64, requires_grad=True)
    finite = {**settings, "penalty": max(settings["penalty"], -2.0)}
    assert gradcheck(lambda *t: svdecode.steered_nll(t[0], t[1], labels, t[2], **finite), (pre, ft, mus))
    shared = {k: v for k, v in settings.items() if k != "penalty"}
    assert gradcheck(lambda *t: svdecode.optimal_strength(*t, labels, **shared), (pre, ft))
    assert gradcheck(lambda *t: svdecode.steering_vector(*t, **shared), (pre, ft))


def test_backward_equals_autograd_of_the_reference_with_infinities():
    pre, ft = model_rows(8, V)
    pre[0, 3] = ft[1, 4] = pre[1, 4] = ft[2, 6] = -math.inf
    pre[3, 0] = math.nan
    labels = kept_labels(torch.nan_to_num(ft))
    strength, grads = torch.randn(8, dtype=pre.dtype), []
    for function in (reference.fused_steer, torch.ops.svdecode.fused_steer):
        a, z, mu = (x.clone().requires_grad_() for x in (pre, ft, strength))
        torch.manual_seed(1)
        name = () if function is reference.fused_steer else ("reference",)
        logprobs, _, _, kl, _, moments, _ = function(a, z, mu, labels, 0.1, -math.inf, "kl", 1e-12, True, *name)
        weights = torch.randn_like(logprobs)
        used = logprobs.isfinite()
        loss = (logprobs[used] * weights[used]).sum() + kl[1:3].sum() + moments.nan_to_num(0).sum() * 0.3
        loss.backward()
        grads.append((a.grad, z.grad, mu.grad))
    for expected, got in zip(*grads, strict=True):
        assert not expected.isnan().any()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert grads[0][0].abs().sum() > 0
