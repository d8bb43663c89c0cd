"""steered_nll on every backend, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, case_id
from rows import INVALID, edge_rows, kept_labels, model_rows

import svdecode


def assert_nll_close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_cases(case, backend, device):
    pre, ft = case.logits(device)
    labels = case.labels(ft)
    mus = torch.tensor([-1.5, 0.0, 0.7, 1.0, 3.0], device=device)  # more than one block of strengths
    nll = svdecode.steered_nll(pre, ft, labels, mus, **case.settings)
    assert nll.shape == (*labels.shape, 5)
    assert_nll_close(nll, svdecode.steered_nll(pre.double(), ft.double(), labels, mus.double(), **case.settings))


@pytest.mark.parametrize("penalty", [-float("inf"), -1.0])
@pytest.mark.parametrize("name", edge_rows())
def test_edges(name, penalty, backend, device):
    pre, ft = (x.float().to(device) for x in edge_rows()[name])
    labels, mus = torch.tensor([4], device=device), torch.tensor([0.0, 2.0], device=device)
    nll = svdecode.steered_nll(pre, ft, labels, mus, penalty=penalty)
    assert_nll_close(nll, svdecode.steered_nll(pre.double(), ft.double(), labels, mus.double(), penalty=penalty))
    assert nll.isnan().all() == (name in INVALID)


def test_no_strengths_and_one_row_alone(backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(5, 9000))
    labels = kept_labels(ft).to(device)
    assert svdecode.steered_nll(pre, ft, labels, pre.new_zeros(0)).shape == (5, 0)
    mus = torch.tensor([0.5, 1.5], device=device)
    whole = svdecode.steered_nll(pre, ft, labels, mus, penalty=-1.0)
    alone = svdecode.steered_nll(pre[3:4], ft[3:4], labels[3:4], mus, penalty=-1.0)
    assert torch.equal(alone[0], whole[3])
