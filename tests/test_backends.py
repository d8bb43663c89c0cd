"""Who computes a call: `backend=` on every operator, `use_backend` for a block, and what a call may not be given."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from cases import BACKENDS, use_backend
from rows import kept_labels, model_rows

import svdecode
from svdecode.ops import backends, compiled


def call(operator: str, pre, ft, **keywords):
    labels = kept_labels(ft).to(ft.device)
    extra = {"optimal_strength": (labels,), "steered_nll": (labels, torch.tensor([0.0, 0.5], device=ft.device))}
    if operator == "steer_topk":
        keywords["k"] = 3
    if operator == "steer_sample":
        keywords["temperature"] = 0.0
    return getattr(svdecode, operator)(pre, ft, *extra.get(operator, ()), **keywords)


OPERATORS = ["fused_steer", "steering_vector", "optimal_strength", "steered_nll", "steer_sample", "steer_topk"]


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_takes_a_backend(operator, device, monkeypatch):
    pre, ft = (x.to(device) for x in model_rows(3, 40, dtype=torch.float32))
    asked = []
    real = backends.implementation
    monkeypatch.setattr(backends, "_REMEMBERED", {})
    monkeypatch.setattr(backends, "implementation", lambda name, op: asked.append(name) or real(name, op))
    expected = first(call(operator, pre, ft, backend="reference"))
    assert asked == ["reference"]
    for tested in BACKENDS:
        with use_backend(tested) as name:
            asked.clear()
            backends._REMEMBERED.clear()
            got = first(call(operator, pre, ft))
            assert asked == [name]
        torch.testing.assert_close(got, first(call(operator, pre, ft, backend=name)))
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda or None, got 'gpu'"):
        call(operator, pre, ft, backend="gpu")
    with pytest.raises(ValueError, match="takes float32, bfloat16 and float16"):
        call(operator, pre.double(), ft, backend=BACKENDS[0].partition("-")[0])


def test_use_backend_holds_for_a_block_and_a_thread_and_nests():
    inside, outside = [], backends._PREFERRED.name
    with svdecode.use_backend("reference"):
        thread = threading.Thread(target=lambda: inside.append(backends._PREFERRED.name))
        thread.start()
        thread.join()
        with pytest.raises(KeyError), svdecode.use_backend("reference"):
            raise KeyError
        assert backends._PREFERRED.name == "reference"
    assert backends._PREFERRED.name == outside
    assert inside == [None] or inside == [outside]
    with pytest.raises(ValueError, match="backend must be one of"), svdecode.use_backend("gpu"):
        pass
    missing = [name for name, found in svdecode.backends().items() if not found]
    for name in missing:
        with pytest.raises(ValueError, match=f"backend='{name}' is not available"), svdecode.use_backend(name):
            pass


def test_use_backend_holds_in_a_graph_that_torch_compiles():
    pre, ft = model_rows(2, 50, dtype=torch.float32)

    @torch.compile(fullgraph=True)
    def steered(pre, ft):
        return svdecode.fused_steer(pre, ft, 0.5).logprobs

    expected = svdecode.fused_steer(pre, ft, 0.5, backend="reference").logprobs
    with svdecode.use_backend("reference"):
        assert torch.equal(steered(pre, ft), expected)


def test_an_out_that_shares_memory_is_refused(device):
    pre, ft = (x.to(device) for x in model_rows(4, 30, dtype=torch.float32))
    for out, name in ((pre, "logits_pre"), (ft, "logits_ft")):
        with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
            svdecode.fused_steer(pre, ft, 0.5, out=out)
    shifted = torch.randn(6, 30, device=device)
    with pytest.raises(ValueError, match="out must not share memory with logits_ft"):
        svdecode.fused_steer(pre, shifted[:4], 0.5, out=shifted[2:])
    svdecode.fused_steer(pre[:2], shifted[:2], 0.5, out=shifted[2:4])
    between = torch.randn(4, 3, 30, device=device).unbind(1)  # rows that lie between each other
    expected = svdecode.fused_steer(between[0], between[1], 0.5).logprobs
    assert torch.equal(svdecode.fused_steer(between[0], between[1], 0.5, out=between[2]).logprobs, expected)
    with pytest.raises(ValueError, match="out must not share memory with logits_pre"):
        svdecode.fused_steer(between[0], between[1], 0.5, out=between[0])
    with pytest.raises(ValueError, match="rows of out must not share memory"):
        svdecode.fused_steer(pre, ft, 0.5, out=torch.empty(100, device=device).as_strided((4, 30), (20, 1)))
    nothing = torch.empty(0, 30, device=device)
    svdecode.fused_steer(nothing, nothing, 0.5, out=nothing)


@pytest.mark.skipif(not svdecode.backends()["cpu"], reason="the C++ operators are not built")
def test_no_memory_looks_as_it_does_in_torch():
    """Tools that try smaller batches look for torch's words."""
    code = (
        "import resource, torch, svdecode\n"
        "x = torch.zeros(1, 100_000).expand(200_000, 100_000)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "for operator in (svdecode.fused_steer, svdecode.steering_vector):\n"
        "    try:\n"
        "        operator(x, x, backend='cpu')\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert all("DefaultCPUAllocator: can't allocate memory" in line for line in lines), lines


def test_an_error_that_is_not_about_memory_stays_as_it_is():
    error = RuntimeError("something else")
    assert compiled.out_of_memory(error, torch.zeros(1)) is error


def test_an_out_that_alone_is_no_plain_tensor_goes_through_torch():
    class Own(torch.Tensor):
        pass

    pre, ft = model_rows(2, 20, dtype=torch.float32)
    out = torch.empty(2, 20).as_subclass(Own)
    expected = svdecode.fused_steer(pre, ft, 0.5)
    got = svdecode.fused_steer(pre, ft, 0.5, out=out)
    assert torch.equal(torch.Tensor(got.logprobs), expected.logprobs)
    assert torch.equal(torch.Tensor(got.kl), expected.kl)
