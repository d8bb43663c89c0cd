"""Rows with few kept tokens, which one program finishes, and those just beyond: more tiles, two kept tokens in one slot."""

from __future__ import annotations

import math

import pytest
import torch
from rows import model_rows

import svdecode
from svdecode.kernels import settings

PLACES = {
    "one token": [7],
    "two in one tile": [7, 900],
    "two in one slot": [8, 9],
    "two tiles": [7, 4999],
    "two tiles, a slot with two": [7, 2048, 2055],
    "three tiles: more than one program holds": [7, 1500, 4999],
    "five tiles: more than one program is left with": [7, 1030, 2050, 3080, 4999],
}


@pytest.mark.parametrize(
    ("dtype", "vocabulary"), [(torch.float32, 5000), (torch.bfloat16, 5008), (torch.bfloat16, 5001)]
)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_row_with_few_kept_tokens(places, dtype, vocabulary, backend, device):
    ft = torch.randn(2, vocabulary)
    ft[:, places] = 20.0 + torch.rand(2, len(places))
    pre = (ft + 0.3 * torch.randn(2, vocabulary)).to(device, dtype)
    ft = ft.to(device, dtype)
    expected = svdecode.fused_steer(pre.double(), ft.double(), 0.8)
    got = svdecode.fused_steer(pre, ft, 0.8)
    assert got.num_kept.tolist() == expected.num_kept.tolist() == [len(places)] * 2
    assert (got.logprobs.isinf() == expected.logprobs.isinf()).all()
    torch.testing.assert_close(got.logprobs.double().exp(), expected.logprobs.exp(), rtol=0, atol=1e-5)
    tokens, logprobs = svdecode.steer_sample(pre, ft, 0.8, temperature=0.0)
    assert tokens.tolist() == expected.logprobs.argmax(-1).tolist()
    torch.testing.assert_close(logprobs.double(), expected.logprobs.amax(-1), rtol=0, atol=1e-5)


def rows_of_all_kinds() -> tuple[torch.Tensor, torch.Tensor]:
    """Nine tiles with a kept token, five, two, one; ties; rows that are not valid, by their last token."""
    pre, ft = (x.float() for x in model_rows(10, 9008, spread=0.3))
    ft[1], pre[1] = 1.0, 2.0  # all tie
    ft[2, [100, 1030, 2050, 4000, 8500]] = 20.0
    ft[3, [2047, 9007]] = 20.0
    ft[4, 9007] = 20.0
    pre[4, 9007] = -math.inf
    ft[5, 5], ft[5, -1] = 20.0, math.nan
    ft[6, -1] = math.inf
    ft[7] = -math.inf
    pre[8, -1] = math.nan
    ft[9, [5, 6, 8000]] = 20.0
    return pre, ft


VALID = [0, 1, 2, 3, 4, 9]


def everything(pre: torch.Tensor, ft: torch.Tensor, mu: torch.Tensor, penalty: float) -> list[torch.Tensor]:
    steered = svdecode.fused_steer(pre, ft, mu, penalty=penalty)
    greedy = svdecode.steer_sample(pre, ft, mu, temperature=0.0, penalty=penalty)
    return [steered.logprobs, steered.num_kept, steered.kl, *greedy]


@pytest.mark.parametrize("penalty", [-math.inf, -1.0])
def test_bitwise_the_same_alone_and_whatever_else_shares_the_work(penalty, backend, device, monkeypatch):
    """Triton has one program for a row of the batch, and three for a row alone."""
    pre, ft = (x.to(device) for x in rows_of_all_kinds())
    mu = torch.linspace(-1.0, 2.0, len(ft), device=device)
    expected = svdecode.fused_steer(pre.double(), ft.double(), mu.double(), penalty=penalty).logprobs
    whole = everything(pre, ft, mu, penalty)
    tokens, logprobs = whole[3:]
    best = expected[VALID].amax(-1)
    torch.testing.assert_close(expected[VALID].gather(-1, tokens[VALID, None])[:, 0], best, rtol=0, atol=1e-6)
    torch.testing.assert_close(logprobs[VALID].double(), best, rtol=0, atol=1e-5)
    assert [tokens[n].item() for n in (1, 9)] == [0, 5]  # the first of those that tie
    invalid = [n for n in range(len(ft)) if n not in VALID]
    assert tokens[invalid].tolist() == [-1] * len(invalid)
    assert logprobs[invalid].isnan().all()
    assert whole[0][invalid].isnan().all()
    monkeypatch.setattr(settings, "GROUP", 4)
    for row in (0, 2, 3, 5, 9):
        here = slice(row, row + 1)
        alone = everything(pre[here], ft[here], mu[here], penalty)
        for name, got, of_batch in zip(("logprobs", "kept", "kl", "token", "logprob"), alone, whole, strict=True):
            torch.testing.assert_close(got, of_batch[here], rtol=0, atol=0, equal_nan=True, msg=f"{name} of row {row}")


def test_scratch_need_not_be_zero(backend, device):
    pre, ft = (x[:4].to(device) for x in rows_of_all_kinds())
    mu = torch.ones(4, device=device)
    expected = everything(pre, ft, mu, -math.inf)
    torch.use_deterministic_algorithms(True)  # it fills what `torch.empty` gives with NaN, integers with their largest
    try:
        got = everything(pre, ft, mu, -math.inf)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
