"""More than 2^31 elements: the last row of a tensor of 2.2 billion gives what it gives alone.

The tensors are reserved, not filled: only the last row is ever touched, and only its programs are run.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import BACKENDS, use_backend
from rows import model_rows

import svdecode
from svdecode.ops import backends

interpreter = pytest.importorskip("triton.runtime.interpreter")
ROWS, VOCABULARY = 16_500, 131_072
LAST = ROWS - 1


@pytest.fixture
def last_row_only(monkeypatch):
    """Run the programs of the last row alone, and copy no tensor back onto itself."""
    monkeypatch.setattr(backends._PREFERRED, "name", "triton")

    def last_programs(count: int) -> range:
        return range(count - count // ROWS, count) if count >= ROWS else range(count)

    monkeypatch.setattr(interpreter, "range", last_programs, raising=False)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


def reserved(dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(ROWS, VOCABULARY, dtype=dtype)
    except RuntimeError:
        pytest.skip("this machine cannot reserve the address space")


@pytest.mark.skipif(not svdecode.backends()["cpu"], reason="the C++ operators are not built")
def test_last_of_more_than_two_billion_elements_in_cpp():
    """All rows are read here, but of memory that was never written to; nothing of the tensors' size is written."""
    pre, ft = (x.bfloat16() for x in model_rows(1, VOCABULARY, spread=2.0))
    big_pre, big_ft = reserved(torch.bfloat16), reserved(torch.bfloat16)
    big_pre[LAST], big_ft[LAST] = pre[0], ft[0]
    labels = torch.full((ROWS,), int(ft.argmax()))
    with use_backend(BACKENDS[-1]):
        moments = svdecode.optimal_strength(big_pre, big_ft, labels)[1][LAST]
        tokens, logprobs = (value[LAST] for value in svdecode.steer_sample(big_pre, big_ft, 0.5, temperature=0.0))
        alone = svdecode.fused_steer(pre, ft, 0.5, labels=labels[:1])
    assert torch.equal(moments, alone.moments[0])
    assert tokens == ft.argmax()
    torch.testing.assert_close(logprobs, alone.logprobs[0, tokens])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU bench/gpu.sh allocates such tensors for real")
def test_last_of_more_than_two_billion_elements(last_row_only, monkeypatch):
    assert ROWS * VOCABULARY > 2**31
    pre, ft = model_rows(1, VOCABULARY, spread=2.0)
    big_pre, big_ft = reserved(torch.bfloat16), reserved(torch.bfloat16)
    big_pre[LAST], big_ft[LAST] = pre[0].bfloat16(), ft[0].bfloat16()
    labels = torch.full((ROWS,), int(ft.argmax()))
    mus = torch.tensor([0.5])
    out = svdecode.fused_steer(big_pre, big_ft, 0.5, labels=labels, out=reserved(torch.float32))
    last = [value[LAST].clone() for value in out]
    nll = svdecode.steered_nll(big_pre, big_ft, labels, mus)[LAST]
    star, moments = (value[LAST] for value in svdecode.optimal_strength(big_pre, big_ft, labels))
    tokens, logprobs = (value[LAST] for value in svdecode.steer_sample(big_pre, big_ft, 0.5, temperature=0.0))
    del out
    delta = svdecode.steering_vector(big_pre, big_ft, alpha=0.1)[LAST].clone()
    grad = reserved(torch.float32)
    grad[LAST] = torch.randn(VOCABULARY)
    saved = torch.ops.svdecode.fused_steer(
        big_pre, big_ft, torch.tensor(0.5), None, 0.1, -math.inf, "kl", 1e-12, True, "triton"
    )
    backward = torch.ops.svdecode.fused_steer_backward(
        *(grad, None, None, None, None, big_pre, big_ft, torch.tensor(0.5), None),
        *(saved[1], saved[3], saved[5], saved[6], 0.1, -math.inf, "kl", 1e-12, False, True, "triton"),
    )
    ft_grad = backward[1][LAST].clone()
    del saved, backward

    monkeypatch.setattr(interpreter, "range", range)
    pre, ft = big_pre[LAST:].clone(), big_ft[LAST:].clone().requires_grad_()
    alone = svdecode.fused_steer(pre, ft, 0.5, labels=labels[:1])
    for got, expected in zip(last, alone, strict=True):
        assert torch.equal(got, expected[0].detach())
    assert torch.equal(nll, svdecode.steered_nll(pre, ft, labels[:1], mus)[0])
    assert torch.equal(star, alone.mu_star[0])
    assert torch.equal(moments, alone.moments[0])
    assert tokens == ft.argmax()
    torch.testing.assert_close(logprobs, alone.logprobs[0, tokens].detach())
    assert torch.equal(delta, svdecode.steering_vector(pre, ft, alpha=0.1)[0])
    plain = svdecode.fused_steer(pre, ft, 0.5).logprobs
    plain.backward(grad[LAST:])
    assert torch.equal(ft_grad, ft.grad[0])
