"""Registration: fakes, autograd and torch.compile of every operator, and the arguments that they refuse."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rows import kept_labels, model_rows

import svdecode

OPS = torch.ops.svdecode
ROOT = Path(__file__).parent.parent


def samples(backend):
    pre, ft = (x.requires_grad_() for x in model_rows(3, 40, dtype=torch.float32))
    labels = kept_labels(ft.detach())
    mu = torch.randn(3, requires_grad=True)
    kl, eps, inf = "kl", 1e-12, -math.inf
    grads = (torch.randn(3, 40), torch.randn(3), torch.randn(3), torch.randn(3), torch.randn(3, 3))
    plain = (pre.detach(), ft.detach())
    steered = OPS.fused_steer(*plain, None, labels, 0.1, -1.0, kl, eps, True, backend)
    nll, saved = OPS.steered_nll(*plain, labels, mu.detach(), 0.1, -1.0, kl, backend)
    outputs = (steered[1], steered[3], steered[5], steered[6])
    return {
        "fused_steer": (pre, ft, mu, labels, 0.1, -1.0, kl, eps, True, backend),
        "fused_steer_out": (*plain, None, labels, 0.1, inf, kl, eps, False, torch.empty(3, 40), backend),
        "fused_steer_backward": (*grads, *plain, None, labels, *outputs, 0.1, -1.0, kl, eps, True, True, backend),
        "steering_vector": (pre, ft, 0.0, kl, backend),
        "steering_vector_backward": (grads[0], *plain, saved, 0.0, kl, False, True, backend),
        "optimal_strength": (pre, ft, labels, 0.1, kl, eps, backend),
        "steered_nll": (pre, ft, labels, mu, 0.1, -1.0, kl, backend),
        "steered_nll_backward": (
            *(torch.randn(3, 3), *plain, labels, mu.detach(), nll, saved),
            *(0.1, -1.0, kl, True, False, backend),
        ),
        "steer_topk": (*plain, mu.detach(), 4, 0.1, inf, kl, backend),
        "steer_sample": (*plain, mu.detach(), torch.rand(3), 0.8, 5, 0.9, 0.1, inf, kl, backend),
    }


@pytest.mark.parametrize("backend", [name for name, found in svdecode.backends().items() if found])
@pytest.mark.parametrize("operator", samples("reference"))
def test_opcheck(operator, backend):
    torch.library.opcheck(getattr(OPS, operator).default, samples(backend)[operator])


@pytest.mark.parametrize("as_tensor", [True, False])
def test_compile_full_graph_once_for_all_rows_and_strengths(as_tensor):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(pre, ft, mu):
        out = svdecode.fused_steer(pre * 1.0, ft, mu, penalty=-1.0)
        return out.logprobs.exp(), out.kl

    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, mu in ((4, 0.5), (7, 1.25), (9, 3.0), (5, -2.0)):
            pre, ft = model_rows(rows, 60, dtype=torch.float32)
            probabilities, kl = step(pre, ft, torch.tensor(mu) if as_tensor else mu)
            expected = svdecode.fused_steer(pre, ft, mu, penalty=-1.0)
            torch.testing.assert_close(probabilities, expected.logprobs.exp())
            torch.testing.assert_close(kl, expected.kl)


def test_compile_trains_through_the_operator():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(pre, ft, labels, mu):
        return svdecode.steered_nll(pre, ft, labels, mu, penalty=-1.0).mean()

    grads = []
    pre, ft = model_rows(4, 60, dtype=torch.float32)
    labels = kept_labels(ft)
    for function in (loss, loss.__wrapped__ if hasattr(loss, "__wrapped__") else loss._torchdynamo_orig_callable):
        z, mu = ft.clone().requires_grad_(), torch.tensor([0.5, 1.0], requires_grad=True)
        function(pre, z, labels, mu).backward()
        grads.append((z.grad, mu.grad))
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0][0].abs().sum() > 0


def test_gradients_stop_where_nothing_needs_them():
    pre, ft = model_rows(3, 40, dtype=torch.float32)
    ft.requires_grad_()
    svdecode.fused_steer(pre, ft, 0.5, penalty=-1.0).kl.sum().backward()
    torch.testing.assert_close(ft.grad, svdecode.steering_vector(pre, ft.detach()), rtol=1e-4, atol=1e-6)
    assert pre.grad is None


def test_bfloat16_logits_get_bfloat16_gradients():
    pre, ft = (x.requires_grad_() for x in model_rows(3, 40, dtype=torch.bfloat16))
    svdecode.fused_steer(pre, ft, 0.5, penalty=-1.0).logprobs[:, 3].sum().backward()
    assert pre.grad.dtype == ft.grad.dtype == torch.bfloat16


# What is refused -----------------------------------------------------------------------------------------------------------

PRE, FT = torch.zeros(2, 8), torch.zeros(2, 8)
LABELS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    [
        (([1.0], FT), {}, TypeError, "logits_pre.*list"),
        ((PRE, FT.numpy()), {}, TypeError, "logits_ft.*ndarray"),
        ((PRE, FT.long()), {}, ValueError, "logits_ft.*int64"),
        ((PRE[:, :7], FT), {}, ValueError, "vocabularies: 7 and 8"),
        ((PRE[:1], FT), {}, ValueError, r"\(1, 8\) and \(2, 8\)"),
        ((PRE, FT.to("meta")), {}, ValueError, "devices: cpu, meta"),
        ((PRE[:, :0], FT[:, :0]), {}, ValueError, "vocabulary"),
        ((torch.tensor(1.0), torch.tensor(1.0)), {}, ValueError, "logits_pre.*vocabulary"),
        ((PRE, FT, math.inf), {}, ValueError, "mu must be finite, got inf"),
        ((PRE, FT, "1"), {}, TypeError, "mu.*str"),
        ((PRE, FT, torch.zeros(3)), {}, ValueError, r"mu must broadcast to the rows \(2,\).*\(3,\)"),
        ((PRE, FT, torch.zeros(2, dtype=torch.long)), {}, ValueError, "mu must be a floating-point tensor"),
        ((PRE, FT), {"alpha": 1.5}, ValueError, r"alpha must be in \[0.0, 1.0\], got 1.5"),
        ((PRE, FT), {"alpha": math.nan}, ValueError, "alpha.*nan"),
        ((PRE, FT), {"alpha": None}, TypeError, "alpha must be a number"),
        ((PRE, FT), {"penalty": 0.5}, ValueError, "penalty.*got 0.5"),
        ((PRE, FT), {"eps": -1.0}, ValueError, "eps.*got -1.0"),
        ((PRE, FT), {"direction": "up"}, ValueError, "direction must be one of kl, log_ratio, got 'up'"),
        ((PRE, FT), {"backend": "tpu"}, ValueError, "backend must be one of .*got 'tpu'"),
        ((PRE, FT), {"backend": "missing"}, ValueError, "backend must be one of reference, cpu, triton, cuda or None"),
        ((PRE.double(), FT), {"backend": "triton"}, ValueError, "float64 is for 'reference'"),
        ((PRE, FT), {"labels": torch.tensor([1, 8])}, ValueError, r"labels must be in \[0, 8\) or -100, got .*8"),
        ((PRE, FT), {"labels": torch.tensor([1, -1])}, ValueError, "labels.*-1"),
        ((PRE, FT), {"labels": torch.tensor([1])}, ValueError, r"labels must have shape \(2,\), got \(1,\)"),
        ((PRE, FT), {"labels": LABELS.float()}, ValueError, "labels must be int64"),
        ((PRE, FT), {"labels": [1, 2]}, TypeError, "labels.*list"),
        ((PRE, FT), {"out": torch.zeros(2, 7)}, ValueError, r"out must be float32 of shape \(2, 8\).*\(2, 7\)"),
        ((PRE, FT), {"out": torch.zeros(2, 8).half()}, ValueError, "out must be float32.*float16"),
        ((PRE, FT), {"out": torch.zeros(8, 2).T}, ValueError, "out must be contiguous in its last dimension"),
        ((PRE, FT), {"out": torch.zeros(8).expand(2, 8)}, ValueError, "out.*share memory"),
        ((PRE, FT.clone().requires_grad_()), {"out": torch.zeros(2, 8)}, ValueError, "out cannot be used"),
    ],
)
def test_fused_steer_refuses(arguments, keywords, error, words):
    with pytest.raises(error, match=words):
        svdecode.fused_steer(*arguments, **keywords)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: svdecode.steered_nll(PRE, FT, LABELS, 1.0), TypeError, "mu"),
        (lambda: svdecode.steered_nll(PRE, FT, LABELS, torch.zeros(2, 2)), ValueError, r"\(M,\)"),
        (lambda: svdecode.optimal_strength(PRE, FT, LABELS, alpha=-1), ValueError, "alpha"),
        (lambda: svdecode.optimal_strength(PRE, FT, LABELS + 8), ValueError, "labels"),
        (lambda: svdecode.steering_vector(PRE, FT, direction=None), ValueError, "direction"),
        (lambda: svdecode.steer_sample(PRE, FT, temperature=-1), ValueError, "temperature"),
        (lambda: svdecode.steer_sample(PRE, FT, top_k=0), ValueError, "top_k"),
        (lambda: svdecode.steer_sample(PRE, FT, top_k=1.5), TypeError, "top_k"),
        (lambda: svdecode.steer_topk(PRE, FT, k=0), ValueError, "k must be in"),
        (lambda: svdecode.steer_topk(PRE, FT, k=PRE.shape[-1] + 1), ValueError, "k must be in"),
        (lambda: svdecode.steer_topk(PRE, FT, k=2.0), TypeError, "k must be an integer"),
        (lambda: svdecode.steer_sample(PRE, FT, top_p=0), ValueError, "top_p"),
        (lambda: svdecode.steer_sample(PRE, FT, top_p=1.1), ValueError, "top_p"),
    ],
)
def test_the_others_refuse(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("wanted", "expected"), [("reference", "tensor"), ("nonsense", "SVDECODE_BACKEND must be one of")]
)
def test_environment_variable_picks_the_backend(wanted, expected):
    code = "import torch, svdecode; print(svdecode.fused_steer(torch.zeros(2, 8), torch.zeros(2, 8)).kl)"
    environment = {**os.environ, "SVDECODE_BACKEND": wanted}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert expected in run.stdout + run.stderr


def test_import_is_quick_and_pulls_in_no_model_library():
    code = (
        "import sys, time, torch; t = time.perf_counter(); import svdecode; t = time.perf_counter() - t;"
        "bad = {'transformers', 'peft', 'triton'} & set(sys.modules); print(t, sorted(bad))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds = min(float(run.stdout.split()[0]) for run in runs)
    assert all("[]" in run.stdout for run in runs)
    assert seconds < 0.2


def test_the_kernels_are_not_importable_under_another_projects_name(tmp_path):
    code = "import importlib.util, svdecode.kernels; print(importlib.util.find_spec('kernels'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.strip() == "None"


def test_in_a_clone_transformers_may_import_the_folder_of_kernels():
    """It asks the module `kernels` for its version, also where triton is missing."""
    code = "import sys; sys.modules['triton'] = None; sys.path.insert(0, ''); import kernels; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), done.stderr
