"""fused_steer on every backend that computes it here, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, STRENGTHS, assert_logprobs_close, assert_scalars_close, case_id, strength
from rows import INVALID, edge_rows, kept_labels, model_rows

import svdecode


def check(pre, ft, mu, labels, backend, **settings):
    out = svdecode.fused_steer(pre, ft, mu, labels=labels, backend=backend, **settings)
    truth = svdecode.fused_steer(pre.double(), ft.double(), mu, labels=labels, **settings)
    assert_logprobs_close(out.logprobs, truth.logprobs)
    assert out.logprobs.dtype == torch.float32
    assert out.num_kept.tolist() == truth.num_kept.tolist()
    torch.testing.assert_close(out.kl.double(), truth.kl, rtol=1e-4, atol=2e-6, equal_nan=True)
    assert_scalars_close(out.mu, truth.mu, "mu")
    if labels is not None:
        assert_scalars_close(out.mu_star, truth.mu_star, "mu_star")
        assert_scalars_close(out.moments, truth.moments, "moments")
    return out


@pytest.mark.parametrize("mu", STRENGTHS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_cases(case, mu, backend, device):
    pre, ft = case.logits(device)
    before = pre.clone(), ft.clone()
    check(pre, ft, strength(mu, case, device), case.labels(ft), backend, **case.settings)
    assert torch.equal(pre, before[0])  # the inputs are never written to
    assert torch.equal(ft, before[1])


@pytest.mark.parametrize("penalty", [-math.inf, -1.0, 0.0])
@pytest.mark.parametrize("name", edge_rows())
def test_edges(name, penalty, backend, device):
    pre, ft = (x.float().to(device) for x in edge_rows()[name])
    out = check(pre, ft, 1.5, torch.tensor([4], device=device), backend, penalty=penalty, alpha=0.05)
    assert (out.num_kept.item() == 0) == (name in INVALID)


@pytest.mark.parametrize("penalty", [-math.inf, -1.0])
def test_an_invalid_row_leaves_its_neighbours_alone(penalty, backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(3, 9001))
    alone = svdecode.fused_steer(pre, ft, 0.5, penalty=penalty, backend=backend)
    ft[1, 8000] = math.nan  # far from the row's kept tokens
    out = svdecode.fused_steer(pre, ft, 0.5, penalty=penalty, backend=backend)
    assert out.logprobs[1].isnan().all()
    assert torch.equal(out.logprobs[[0, 2]], alone.logprobs[[0, 2]])


def test_labels_that_a_gpu_cannot_refuse_give_nan(backend, device):
    from svdecode.ops.backends import implementation

    pre, ft = (x.float().to(device) for x in model_rows(2, 50))
    labels = torch.tensor([50, 3], device=device)
    run = implementation(backend, "fused_steer")
    *_, mu_star, moments, _ = run(pre, ft, torch.tensor(1.0), labels, 0.1, -math.inf, "kl", 1e-12, True)
    assert mu_star.isnan().tolist() == [True, False]
    assert moments.isnan().all(-1).tolist() == [True, False]


def test_a_vocabulary_beyond_64_splits(backend, device):
    pre, ft = (x.to(device, torch.bfloat16) for x in model_rows(1, 300_000))
    out = svdecode.fused_steer(pre, ft, 0.5, backend=backend)
    truth = svdecode.fused_steer(pre.double(), ft.double(), 0.5)
    assert_logprobs_close(out.logprobs, truth.logprobs)
    assert svdecode.steer_sample(pre, ft, 0.5, temperature=0.0)[0] == truth.logprobs.argmax(-1)


def test_without_labels_and_kl(backend, device):
    pre, ft = (x.to(device) for x in model_rows(3, 5000, dtype=torch.float32))
    out = svdecode.fused_steer(pre, ft, 0.5, return_kl=False, backend=backend)
    assert out.kl is None
    assert out.mu_star is None
    assert out.moments is None
    assert_logprobs_close(out.logprobs, svdecode.fused_steer(pre.double(), ft.double(), 0.5).logprobs)


@pytest.mark.parametrize("vocabulary", [9001, 50_257])
def test_the_kl_changes_no_other_number(vocabulary, backend, device):
    """To the bit: an operator that needs no KL, as optimal_strength, would otherwise give another mu_star."""
    pre, ft = (x.to(device, torch.bfloat16) for x in model_rows(3, vocabulary, spread=2.0))
    labels = ft.argmax(-1)
    full = svdecode.fused_steer(pre, ft, 0.5, labels=labels, backend=backend)
    mu_star, moments = svdecode.optimal_strength(pre, ft, labels, backend=backend)
    assert torch.equal(full.mu_star, mu_star)
    assert torch.equal(full.moments, moments)
    without_kl = svdecode.fused_steer(pre, ft, 0.5, return_kl=False, backend=backend)
    assert torch.equal(full.logprobs, without_kl.logprobs)
    assert torch.equal(svdecode.fused_steer(pre, ft, 0.5, backend=backend).logprobs, without_kl.logprobs)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "padded", "permuted", "scattered"])
def test_strided_rows(layout, backend, device):
    big = [x.float().to(device) for x in model_rows(3, 4, 2, 640)]

    def view(x):
        return {
            "sliced": lambda: x[:, :-1, 0],
            "transposed": lambda: x[:, :, 1].transpose(0, 1),
            "expanded": lambda: x[0, 0, 0].expand(3, 2, 640),
            "padded": lambda: x[:, 0, 0, :601],
            "permuted": lambda: x.permute(2, 0, 1, 3),
            "scattered": lambda: x[..., ::2],
        }[layout]()

    pre, ft = view(big[0]), view(big[1])
    strided = svdecode.fused_steer(pre, ft, 0.5, backend=backend)
    dense = svdecode.fused_steer(pre.contiguous(), ft.contiguous(), 0.5, backend=backend)
    assert torch.equal(strided.logprobs, dense.logprobs)
    assert torch.equal(strided.kl, dense.kl)


def test_out_receives_the_logprobs_in_any_layout(backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(2, 3, 640))
    expected = svdecode.fused_steer(pre, ft, 0.5, backend=backend).logprobs
    buffer = torch.full((3, 2, 700), 7.0, device=device)
    out = buffer.transpose(0, 1)[..., :640]
    result = svdecode.fused_steer(pre, ft, 0.5, out=out, backend=backend)
    assert result.logprobs is out
    assert torch.equal(out, expected)
    assert (buffer[..., 640:] == 7.0).all()


@pytest.mark.parametrize(
    ("rows", "vocabulary", "penalty", "own_strength"),
    [(257, 1500, -math.inf, True), (65, 4200, -math.inf, False), (9, 9000, -1.0, True)],
)
def test_bitwise_the_same_alone_and_in_any_batch(rows, vocabulary, penalty, own_strength, backend, device):
    pre, ft = (x.float().to(device) for x in model_rows(rows, vocabulary))
    mu, labels = (None, kept_labels(ft)) if own_strength else (0.5, None)

    def run(part):
        label = labels[part] if own_strength else None
        return svdecode.fused_steer(pre[part], ft[part], mu, labels=label, penalty=penalty, backend=backend)

    whole = run(slice(None))
    for start, size in ((0, 1), (rows - 1, 1), (5, 3), (1, min(64, rows - 1))):
        part = slice(start, start + size)
        alone = run(part)
        for name in whole._fields:
            if getattr(whole, name) is not None:
                assert torch.equal(getattr(alone, name), getattr(whole, name)[part]), name
