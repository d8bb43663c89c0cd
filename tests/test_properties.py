"""Random shapes, dtypes, settings and planted infinities and NaN (hypothesis), on every backend against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BACKENDS, assert_logprobs_close, use_backend
from draws import assert_same_draw, draw
from rows import model_rows

import svdecode

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("tested", BACKENDS)
@given(
    rows=st.integers(1, 3),
    vocabulary=st.integers(1, 2300),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.bfloat16])] * 2),
    alpha=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    penalty=st.sampled_from([-math.inf, -7.5, -1.0, 0.0]),
    direction=st.sampled_from(["kl", "log_ratio"]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    planted=st.lists(
        st.tuples(st.booleans(), st.integers(0, 10**6), st.sampled_from([-math.inf, -math.inf, math.nan, math.inf])),
        max_size=4,
    ),
    seed=st.integers(0, 2**31),
)
def test_fused_steer_equals_the_reference(
    tested, rows, vocabulary, dtypes, alpha, penalty, direction, spread, planted, seed
):
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pre, ft = model_rows(rows, vocabulary, spread=spread)
    for which, position, value in planted:
        (ft if which else pre).view(-1)[position % ft.numel()] = value
    pre, ft = pre.to(device, dtypes[0]), ft.to(device, dtypes[1])
    settings = dict(alpha=alpha, penalty=penalty, direction=direction)
    with use_backend(tested) as name:
        out = svdecode.fused_steer(pre, ft, 0.7, backend=name, **settings)
    truth = svdecode.fused_steer(pre.double(), ft.double(), 0.7, **settings)
    assert_logprobs_close(out.logprobs, truth.logprobs)
    assert out.num_kept.tolist() == truth.num_kept.tolist()
    torch.testing.assert_close(out.kl.double(), truth.kl, rtol=1e-4, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("tested", BACKENDS)
@given(
    vocabulary=st.integers(1, 1100),
    alpha=st.sampled_from([0.0, 0.05, 0.5]),
    penalty=st.sampled_from([-math.inf, -2.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 5, 10**6]),
    top_p=st.sampled_from([None, 0.2, 0.95]),
    seed=st.integers(0, 10**6),
)
def test_steer_sample_draws_the_same(tested, vocabulary, alpha, penalty, temperature, top_k, top_p, seed):
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pre, ft = (x.float().to(device) for x in model_rows(2, vocabulary, spread=2.0))
    uniform = torch.rand(2, device=device)
    rest = dict(temperature=temperature, top_k=top_k, top_p=top_p, alpha=alpha, penalty=penalty, direction="kl")
    with use_backend(tested) as name:
        drawn = draw(pre, ft, 0.8, uniform, name, **rest)
    assert_same_draw(*drawn, pre, ft, 0.8, uniform, rest)


@pytest.mark.parametrize("tested", BACKENDS)
@given(
    vocabulary=st.integers(1, 1100),
    alpha=st.sampled_from([0.0, 0.05, 0.5]),
    penalty=st.sampled_from([-math.inf, -2.0, 0.0]),
    k=st.integers(1, 60),
    levels=st.sampled_from([None, 2, 6]),
    seed=st.integers(0, 10**6),
)
def test_steer_topk_takes_the_best(tested, vocabulary, alpha, penalty, k, levels, seed):
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pre, ft = (x.float().to(device) for x in model_rows(2, vocabulary, spread=2.0))
    if levels is not None:  # a few values that many tokens share, in the same model twice: ties that are exact
        pre = ft = (ft * levels / 4).round()
    k = min(k, vocabulary)
    settings = dict(alpha=alpha, penalty=penalty, direction="kl")
    with use_backend(tested):
        tokens, logprobs = svdecode.steer_topk(pre, ft, 0.8, k=k, **settings)
    true_tokens, truth = svdecode.steer_topk(pre.double(), ft.double(), 0.8, k=k, **settings)
    torch.testing.assert_close(logprobs.double(), truth, rtol=3e-7, atol=1e-5)
    if levels is not None:
        assert tokens.tolist() == true_tokens.tolist()
