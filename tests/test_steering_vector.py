"""steering_vector on every backend, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, case_id
from rows import edge_rows

import svdecode


def assert_delta_close(got, expected):
    scale = expected.nan_to_num().abs().amax().item() if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-6 * scale + 1e-12, equal_nan=True)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_cases(case, alpha, backend, device):
    pre, ft = case.logits(device)
    delta = svdecode.steering_vector(pre, ft, alpha=alpha, direction=case.direction)
    expected = svdecode.steering_vector(pre.double(), ft.double(), alpha=alpha, direction=case.direction)
    assert_delta_close(delta, expected)
    assert torch.equal(delta == 0, expected == 0) or alpha == 0.0
    assert delta.dtype == torch.float32


@pytest.mark.parametrize("direction", ["kl", "log_ratio"])
@pytest.mark.parametrize("name", edge_rows())
def test_edges(name, direction, backend, device):
    pre, ft = (x.float().to(device) for x in edge_rows()[name])
    assert_delta_close(
        svdecode.steering_vector(pre, ft, direction=direction),
        svdecode.steering_vector(pre.double(), ft.double(), direction=direction),
    )
