"""Rows with few kept tokens, which one program finishes, and those just beyond: more tiles, two kept tokens in one slot."""

from __future__ import annotations

import pytest
import torch

import svdecode

PLACES = {
    "one token": [7],
    "two in one tile": [7, 900],
    "two in one slot": [8, 9],
    "two tiles": [7, 4999],
    "two tiles, a slot with two": [7, 2048, 2055],
    "three tiles: more than one program holds": [7, 1500, 4999],
    "five tiles: more than one program is left with": [7, 1030, 2050, 3080, 4999],
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_row_with_few_kept_tokens(places, backend, device):
    ft = torch.randn(2, 5000)
    ft[:, places] = 20.0 + torch.rand(2, len(places))
    pre = (ft + 0.3 * torch.randn(2, 5000)).to(device)
    ft = ft.to(device)
    expected = svdecode.fused_steer(pre.double(), ft.double(), 0.8)
    got = svdecode.fused_steer(pre, ft, 0.8)
    assert got.num_kept.tolist() == expected.num_kept.tolist() == [len(places)] * 2
    assert (got.logprobs.isinf() == expected.logprobs.isinf()).all()
    torch.testing.assert_close(got.logprobs.double().exp(), expected.logprobs.exp(), rtol=0, atol=1e-5)
    tokens, logprobs = svdecode.steer_sample(pre, ft, 0.8, temperature=0.0)
    assert tokens.tolist() == expected.logprobs.argmax(-1).tolist()
    torch.testing.assert_close(logprobs.double(), expected.logprobs.amax(-1), rtol=0, atol=1e-5)
