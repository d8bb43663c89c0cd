"""The C++ product for few rows: against float64, alone and in any batch, and where torch's own must answer."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_lora
from torch import nn

import svdecode
from svdecode.models.few_rows_linear import MAX_ROWS, FewRowsLinear, use_few_rows
from svdecode.ops import compiled

pytestmark = pytest.mark.skipif(compiled.WHY_MISSING is not None, reason=str(compiled.WHY_MISSING))


@pytest.fixture(params=["base", "avx2"])
def instructions(request):
    before = compiled.instruction_set()
    try:
        compiled.instruction_set(request.param)
    except RuntimeError:
        pytest.skip("this CPU lacks it")
    yield request.param
    compiled.instruction_set(before)


def layer(inner, outer, dtype, bias=True):
    linear = nn.Linear(inner, outer, bias=bias, dtype=dtype)
    other = nn.Sequential(linear)
    use_few_rows(other)
    assert type(other[0]) is FewRowsLinear
    return other[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [1, 7, 8, 61, 576])
@pytest.mark.parametrize("outer", [1, 3, 4, 48, 130])
@torch.no_grad()
def test_against_float64(instructions, dtype, inner, outer):
    for bias in (True, False):
        linear = layer(inner, outer, dtype, bias)
        for rows in (1, 2, 3, 4, 7, 8, 32):
            x = torch.randn(rows, 1, inner).to(dtype)
            truth = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
            tolerance = 1e-5 if dtype == torch.float32 else 2**-8  # one rounding of the result
            got = linear(x)
            assert got.dtype == dtype
            assert got.shape == (rows, 1, outer)
            torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(monkeypatch, instructions, dtype):
    monkeypatch.setitem(MAX_ROWS, dtype, 200)
    linear = layer(579, 1000, dtype)
    x = torch.randn(150, 579).to(dtype)  # several tiles of rows, the last one with an incomplete block
    together = linear(x)
    for row in (*range(7), 63, 64, 149):
        assert torch.equal(linear(x[row : row + 1])[0], together[row])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear(x), together)
    finally:
        torch.set_num_threads(threads)


def test_where_torch_answers(monkeypatch):
    linear = layer(64, 32, torch.float32)
    calls = []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(x.shape) or x)
    many = torch.randn(MAX_ROWS[torch.float32] + 1, 64)
    with torch.no_grad():
        linear(many[:2])
        assert calls == []
        linear(many)
        linear(many[:4].t().contiguous().t())
        linear(many[:2].double())
    linear(many[:2])  # gradients
    assert len(calls) == 4


def test_only_our_own_tree_is_changed():
    model = tiny_lora()
    steered = svdecode.steer(model, mu=1.0)
    assert any(type(module) is FewRowsLinear for module in steered.modules())
    assert not any(type(module) is FewRowsLinear for module in model.modules())


def test_sizes_that_do_not_fit_are_errors():
    product = torch.ops.svdecode_compiled.few_rows_linear
    with pytest.raises(RuntimeError, match="x has 3 features and the weight 4"):
        product(torch.ones(1, 3), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="differ in dtype"):
        product(torch.ones(1, 4), torch.ones(2, 4, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="not contiguous"):
        product(torch.ones(4, 2).t(), torch.ones(2, 4))
