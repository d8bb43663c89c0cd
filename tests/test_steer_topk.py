"""steer_topk on every backend: the k best of the reference's steered log-probs, none twice, ties by the lower token."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, case_id, strength
from rows import INVALID, edge_rows, model_rows

import svdecode


def assert_best(tokens, logprobs, truth, k):
    """`truth` (..., V) float64 log-probs. Which of two tokens within rounding of each other comes first is free."""
    expected = truth.topk(k, -1).values
    torch.testing.assert_close(logprobs.double(), expected, rtol=3e-7, atol=1e-5)
    own = truth.gather(-1, tokens.clamp(min=0)).where(tokens >= 0, -math.inf)
    torch.testing.assert_close(own, expected, rtol=3e-7, atol=1e-5)
    assert ((tokens == -1) == (logprobs == -math.inf)).all()
    for row in tokens.reshape(-1, k).tolist():
        found = [token for token in row if token >= 0]
        assert len(set(found)) == len(found), "a token was taken twice"
    steps = logprobs[..., 1:].nan_to_num(neginf=-1e30) - logprobs[..., :-1].nan_to_num(neginf=-1e30)
    assert (steps <= 1e-6).all()


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("mu", ["number", "rows"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_best_of_the_distribution(case, mu, k, backend, device):
    pre, ft = case.logits(device)
    mu = strength(mu, case, device)
    k = min(k, pre.shape[-1])
    tokens, logprobs = svdecode.steer_topk(pre, ft, mu, k=k, **case.settings)
    assert tokens.shape == logprobs.shape == (*case.shape[:-1], k)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    truth = svdecode.fused_steer(pre.double(), ft.double(), mu, **case.settings).logprobs  # on the reference
    if truth.numel():
        assert_best(tokens, logprobs, truth, k)
        assert_best(*svdecode.steer_topk(pre.double(), ft.double(), mu, k=k, **case.settings), truth, k)


def test_the_whole_vocabulary_in_order(backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(2, 37))
    tokens, logprobs = svdecode.steer_topk(pre, ft, 0.7, k=37, alpha=0.0)
    assert_best(tokens, logprobs, svdecode.fused_steer(pre.double(), ft.double(), 0.7, alpha=0.0).logprobs, 37)
    assert tokens.sort(-1).values.tolist() == [list(range(37))] * 2


def test_ties_go_to_the_lower_token_across_tiles_and_splits(backend, device):
    ft = torch.zeros(1, 9000, device=device)
    ft[0, [8999, 5000, 700, 701, 2100]] = 5.0
    ft[0, 6000] = 6.0
    pre = torch.zeros_like(ft)
    tokens, logprobs = svdecode.steer_topk(pre, ft, 0.0, k=8)
    assert tokens[0].tolist() == [6000, 700, 701, 2100, 5000, 8999, -1, -1]
    assert logprobs[0, 6:].tolist() == [-math.inf] * 2
    assert svdecode.steer_topk(pre, pre, 0.0, k=3, alpha=0.0)[0].tolist() == [[0, 1, 2]]


def test_tokens_outside_the_kept_set_with_a_finite_penalty(backend, device):
    """A strength that pushes the only kept token down: others come first, and it comes in its place."""
    ft = torch.zeros(1, 5000, device=device)
    ft[0, 3], ft[0, 4800] = 4.0, 1.0
    pre = ft.clone()
    pre[0, 3] = 6.0
    options = dict(penalty=0.0, direction="log_ratio", alpha=0.9)
    tokens, _ = svdecode.steer_topk(pre, ft, 200.0, k=4, **options)
    assert tokens.tolist() == [[4800, 0, 1, 2]]


@pytest.mark.parametrize("name", edge_rows())
def test_edges(name, backend, device):
    pre, ft = (x.float().to(device) for x in edge_rows()[name])
    tokens, logprobs = svdecode.steer_topk(pre, ft, 1.5, k=6)
    if name in INVALID:
        assert tokens.tolist() == [[-1] * 6]
        assert logprobs.isnan().all()
    else:
        assert_best(tokens, logprobs, svdecode.fused_steer(pre.double(), ft.double(), 1.5).logprobs, 6)


def test_one_bad_row_or_strength_leaves_the_others_alone(backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(4, 5000))
    ft[1, 4100] = math.nan
    mu = torch.tensor([0.5, 0.5, math.nan, 0.5], device=device)
    tokens, logprobs = svdecode.steer_topk(pre, ft, mu, k=3)
    assert logprobs.isnan().all(-1).tolist() == [False, True, True, False]
    assert (tokens[1:3] == -1).all()
    alone = svdecode.steer_topk(pre[3:], ft[3:], 0.5, k=3)
    assert torch.equal(tokens[3:], alone[0])
    assert torch.equal(logprobs[3:], alone[1])


def test_agrees_with_greedy_and_with_strided_rows(backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(5, 6, 4500))
    views = pre.transpose(0, 1), ft.transpose(0, 1)
    tokens, logprobs = svdecode.steer_topk(*views, 0.6, k=2)
    greedy = svdecode.steer_sample(*views, 0.6, temperature=0.0)
    assert torch.equal(tokens[..., 0], greedy[0])
    torch.testing.assert_close(logprobs[..., 0], greedy[1], rtol=1e-6, atol=1e-6)
