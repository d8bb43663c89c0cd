"""The CUDA kernels' PTX, as nvcc makes it, against the float64 reference, in several orders of the blocks."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from cases import assert_logprobs_close, assert_scalars_close
from rows import edge_rows, kept_labels, model_rows

import svdecode
from ptx import cuda_launcher
from ptx.cuda_launcher import CudaOperators
from ptx.dtypes import Fault
from ptx.machine import ORDERS
from ptx.program import entries
from svdecode.ops import reference

pytestmark = pytest.mark.skipif(cuda_launcher.why_missing() is not None, reason=str(cuda_launcher.why_missing()))


@pytest.fixture(scope="module")
def built():
    return cuda_launcher.build()


@pytest.fixture(scope="module")
def cuda(built):
    return CudaOperators(*built)


@pytest.fixture(params=ORDERS)
def order(request, cuda):
    """One block after the other in an order; all at once afterwards."""
    cuda.order, cuda.at_once = request.param, 1
    yield request.param
    cuda.order, cuda.at_once = "forward", None


def check_steer(cuda, pre, ft, labels, **settings):
    found = cuda.fused_steer(pre, ft, 1.5, labels, **settings)
    truth = svdecode.fused_steer(
        pre.double(), ft.double(), None if labels is not None else 1.5, labels=labels, **settings
    )
    assert_logprobs_close(found["logprobs"], truth.logprobs)
    assert found["num_kept"].tolist() == truth.num_kept.tolist()
    torch.testing.assert_close(found["kl"].double(), truth.kl, rtol=1e-4, atol=2e-6, equal_nan=True)
    if labels is not None:
        assert_scalars_close(found["mu_star"], truth.mu_star, "mu_star")
        assert_scalars_close(found["moments"], truth.moments, "moments")
    return found


@pytest.mark.parametrize(("penalty", "direction", "labelled"), [(-math.inf, "kl", True), (-1.0, "log_ratio", False)])
def test_fused_steer_in_any_order_of_blocks(cuda, order, penalty, direction, labelled):
    pre, ft = (x.bfloat16() for x in model_rows(2, 4200, spread=1.0))
    labels = kept_labels(ft) if labelled else None
    found = check_steer(cuda, pre, ft, labels, penalty=penalty, direction=direction)
    cuda.order, cuda.at_once = "forward", None
    again = cuda.fused_steer(pre, ft, 1.5, labels, penalty=penalty, direction=direction)
    for name, value in found.items():
        assert torch.equal(value, again[name]), name


def test_own_strength_with_a_finite_penalty(cuda):
    pre, ft = model_rows(2, 4200, dtype=torch.float32)
    check_steer(cuda, pre, ft, kept_labels(ft), penalty=-1.0)


def test_with_the_errors_that_approximate_instructions_may_have(built):
    pre, ft = model_rows(2, 4200, dtype=torch.float32)
    perturbed = CudaOperators(*built, perturb=1.0)
    found = check_steer(perturbed, pre, ft, kept_labels(ft))
    assert not torch.equal(found["kl"], CudaOperators(*built).fused_steer(pre, ft, 1.5, kept_labels(ft))["kl"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 1), (3, 13), (2, 2048), (1, 2049), (2, 4097)])
def test_fused_steer_of_every_shape(cuda, shape, dtype):
    pre, ft = (x.to(dtype) for x in model_rows(*shape))
    check_steer(cuda, pre, ft, None)
    check_steer(cuda, pre, ft.float(), kept_labels(ft))


@pytest.mark.parametrize("name", edge_rows())
def test_edges(cuda, name):
    pre, ft = (x.float() for x in edge_rows()[name])
    check_steer(cuda, pre, ft, None, alpha=0.05)


def test_rows_at_any_address(cuda):
    """Rows of an odd length begin at every address that their elements may have."""
    memory = [x.bfloat16() for x in model_rows(3, 2051)]
    pre, ft = (x[:, 1:2050] for x in memory)
    check_steer(cuda, pre, ft, None)


def test_steer_sample(cuda, order):
    pre, ft = model_rows(3, 5000, dtype=torch.float32, spread=1.0)
    uniform = torch.rand(3)
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.3, 0, 1.0), (0.8, 30, 0.9)):
        found = cuda.steer_sample(pre, ft, 0.8, uniform, temperature, top_k, top_p, penalty=-1.0)
        limits = (top_k or None, top_p if top_p < 1 else None)
        truth = reference.steer_sample(
            pre.double(), ft.double(), torch.tensor(0.8).double(), uniform, temperature, *limits, 0.1, -1.0, "kl"
        )
        assert found[0].tolist() == truth[0].tolist()
        assert_logprobs_close(found[1], truth[1])


def test_steer_topk(cuda, order):
    pre, ft = model_rows(2, 5000, dtype=torch.float32, spread=1.0)
    found = cuda.steer_topk(pre, ft, 0.8, 8)
    truth = reference.steer_topk(pre.double(), ft.double(), torch.tensor(0.8).double(), 8, 0.1, -math.inf, "kl")
    assert found[0].tolist() == truth[0].tolist()
    assert_logprobs_close(found[1], truth[1])


def test_every_kernel_has_run(cuda, built):
    """What the tests above have not launched is not proven."""
    pre, ft = model_rows(2, 5000, dtype=torch.float32)
    cuda.fused_steer(pre, ft, 0.5, kept_labels(ft))
    cuda.fused_steer(pre, ft, 0.5, penalty=-1.0)
    with contextlib.suppress(Fault):  # the race above, in the kernel after the one for moments
        cuda.fused_steer(pre, ft, 0.5, kept_labels(ft), penalty=-1.0)
    cuda.steer_sample(pre, ft, 0.5, torch.rand(2), 1.0, 0, 1.0)
    cuda.steer_topk(pre, ft, 0.5, 3)
    kernels = {name for path in built[1] for name in entries(path.read_text())}
    families = {name.split("_kernel")[0] for name in kernels}  # one for each pair of dtypes
    assert families == {name.split("_kernel")[0] for name in cuda.launched}
