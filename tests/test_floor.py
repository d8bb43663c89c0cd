"""The floor: scores for the tokens outside K, far below the kept ones."""

from __future__ import annotations

import math

import pytest
import torch

import svdecode
from svdecode.ops.floor import FLOOR_GAP, with_floor


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return 3 * torch.randn(2, 5, 97)


def test_kept_tokens_keep_their_log_probabilities_and_the_rest_follows_the_adapted_model(pair):
    pre, ft = pair
    steered = svdecode.fused_steer(pre, ft, 0.7).logprobs
    scores = with_floor(steered, ft)
    kept = steered > -math.inf
    assert torch.equal(scores[kept], steered[kept])
    for row in range(len(ft)):
        outside = ~kept[row]
        assert scores[row, outside].max() <= steered[row, kept[row]].min() - FLOOR_GAP
        in_order = ft[row, outside][scores[row, outside].argsort()]
        torch.testing.assert_close(in_order, ft[row, outside].sort().values, atol=1e-3, rtol=0)
        # Where a mask forbids all of K, the adapted model decides.
        floor = scores[row].masked_fill(kept[row], -math.inf).softmax(-1)
        adapted = ft[row].masked_fill(kept[row], -math.inf).softmax(-1)
        torch.testing.assert_close(floor, adapted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_no_draw_sees_the_floor(pair, temperature):
    pre, ft = pair
    steered = svdecode.fused_steer(pre, ft, 5.0).logprobs  # a strength that leaves some kept tokens very unlikely
    with_it = (with_floor(steered, ft) / temperature).softmax(-1)
    assert torch.equal(with_it, (steered / temperature).softmax(-1))


def test_edges(pair):
    pre, ft = pair
    ft[0, 3] = -math.inf
    ft[1, 4] = math.nan
    steered = svdecode.fused_steer(pre, ft, 0.7).logprobs
    scores = with_floor(steered, ft)
    assert scores[0, 3] == -math.inf
    assert scores[1].isnan().all()
    assert scores[[0, 2, 3, 4]].isnan().sum() == 0

    finite = svdecode.fused_steer(pre[2:], ft[2:], 0.7, penalty=-1.0).logprobs
    assert torch.equal(with_floor(finite, ft[2:]), finite)
