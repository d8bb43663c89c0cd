"""The compiled operators: the same for any threads, order of blocks and address; and what is said where they are missing."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, use_backend
from rows import kept_labels, model_rows

import svdecode
from svdecode.ops import compiled

CPU = [name for name in BACKENDS if name.startswith("cpu")]
EMULATED = "cuda" in BACKENDS and not torch.cuda.is_available()


def everything(pre, ft, labels):
    """All results of all operators."""
    results = {}
    for penalty in (-math.inf, -1.0):
        for name, value in svdecode.fused_steer(pre, ft, labels=labels, penalty=penalty)._asdict().items():
            results[f"{name} {penalty}"] = value
        mus = torch.tensor([0.0, 0.7, 2.0])
        results[f"nll {penalty}"] = svdecode.steered_nll(pre, ft, labels, mus, penalty=penalty)
        for temperature in (0.0, 1.3):
            generator = torch.Generator().manual_seed(1)
            drawn = svdecode.steer_sample(
                pre, ft, 0.8, temperature=temperature, top_k=30, top_p=0.9, penalty=penalty, generator=generator
            )
            results[f"token {penalty} {temperature}"], results[f"logprob {penalty} {temperature}"] = drawn
    results["delta"] = svdecode.steering_vector(pre, ft, alpha=0.01)
    leaves = [x.clone().requires_grad_() for x in (pre, ft)]
    out = svdecode.fused_steer(*leaves, labels=labels, penalty=-1.0)
    (out.logprobs.square().sum() + out.kl.sum() + out.moments.sum()).backward()
    results["pre grad"], results["ft grad"] = (leaf.grad for leaf in leaves)
    return results


@pytest.fixture(params=CPU)
def cpu(request):
    with use_backend(request.param):
        yield


@pytest.mark.parametrize(("rows", "spread"), [(1, 3.0), (3, 0.3), (16, 2.0)])
def test_bitwise_the_same_for_any_number_of_threads(rows, spread, cpu):
    """One row is shared out by its tiles, many by rows; flat rows share out the passes over kept tiles too."""
    pre, ft = (x.float() for x in model_rows(rows, 50_000 if rows < 16 else 20_000, spread=spread))
    labels = kept_labels(ft)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(everything(pre, ft, labels))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_address(dtype, backend, device):
    """Rows that begin at no multiple of 16 bytes, at the very end of their memory."""
    pre, ft = (x.to(device, dtype) for x in model_rows(3, 2051))
    expected = svdecode.fused_steer(pre, ft, 0.5)
    for offset in (1, 3):
        shifted = []
        for x in (pre, ft):
            memory = torch.zeros(offset + x.numel(), dtype=dtype, device=device)
            memory[offset:] = x.flatten()
            shifted.append(memory[offset:].view(x.shape))
        for got, value in zip(svdecode.fused_steer(*shifted, 0.5), expected, strict=True):
            assert value is None or torch.equal(got, value)


@pytest.mark.skipif(not EMULATED, reason="takes the host emulation of the CUDA kernels")
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_any_order_of_blocks(order, monkeypatch):
    """Whichever block is a row's last finishes it, to the same bits."""
    monkeypatch.setenv("SVDECODE_EMULATION_ORDER", order)
    pre, ft = (x.float() for x in model_rows(3, 9001, spread=1.0))
    ft[1, 4000] = math.nan
    labels = kept_labels(ft)
    with use_backend("cuda"):
        found = everything(pre, ft, labels)
        monkeypatch.setenv("SVDECODE_EMULATION_ORDER", "forward")
        expected = everything(pre, ft, labels)
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


@pytest.mark.skipif(not CPU, reason="the C++ operators are not built")
def test_a_default_device_does_not_reach_the_numbers_of_a_call():
    """They are read by C++ on the host, and are kept for later calls."""
    pre, ft = model_rows(2, 50, dtype=torch.float32)
    with torch.device("meta"), use_backend(CPU[-1]):
        out = svdecode.fused_steer(pre, ft, 0.123456)
    assert torch.equal(out.mu, torch.full((2,), 0.123456))


@pytest.mark.skipif(not CPU, reason="the C++ operators are not built")
def test_a_draw_does_not_ask_for_the_gradient_of_its_strength():
    pre, ft = model_rows(2, 50, dtype=torch.float32)
    mu = torch.tensor([0.5, 0.7], requires_grad=True)
    with use_backend(CPU[-1]):
        assert not svdecode.steer_sample(pre, ft, mu)[1].requires_grad


@pytest.mark.skipif(
    not CPU or sys.platform != "linux", reason="takes the C++ operators, and libraries named as on Linux"
)
def test_the_look_up_sees_libraries_that_python_loaded_for_itself():
    """As torch's CUDA library is, whose stream the kernels are launched on."""
    torch_python = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    expected = ctypes.cast(ctypes.CDLL(str(torch_python)).initModule, ctypes.c_void_p).value
    symbol_of = ctypes.CDLL(str(compiled.LIBRARY)).svdecode_symbol_of
    symbol_of.argtypes, symbol_of.restype = (ctypes.c_char_p, ctypes.c_char_p), ctypes.c_void_p
    assert symbol_of(b"libtorch_python.so", b"initModule") == expected
    assert symbol_of(b"libtorch_python.so", b"no_such_symbol") is None
    assert symbol_of(b"no_such_library.so", b"initModule") is None


WRONG = [
    ({"uniform": torch.zeros(2, dtype=torch.float64)}, "uniform must be Float, got Double"),
    ({"uniform": torch.zeros(2, dtype=torch.bfloat16)}, "uniform must be Float, got BFloat16"),
    ({"uniform": torch.zeros(1)}, "uniform must have 2 numbers, got 1"),
    ({"uniform": torch.zeros(4)[::2]}, "uniform must be contiguous"),
    ({"uniform": torch.zeros(2, device="meta")}, "uniform is on the wrong device"),
    ({"numbers": torch.zeros(9)}, "numbers must be Double, got Float"),
    ({"numbers": torch.zeros(6, dtype=torch.float64)}, "numbers must have 9 numbers, got 6"),
    ({"mu": torch.zeros(2, dtype=torch.float16)}, "mu must be Float, got Half"),
    ({"pre": torch.zeros(2, 30, dtype=torch.float64)}, "logits_pre must be float32, bfloat16 or float16, got Double"),
    ({"ft": torch.zeros(2, 30, dtype=torch.int32)}, "logits_ft must be float32, bfloat16 or float16, got Int"),
    ({"pre": torch.zeros(2, 29)}, "logits_pre differs from logits_ft in shape or device"),
]


@pytest.mark.skipif(not CPU, reason="the C++ operators are not built")
@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message.replace(" ", "-") for _, message in WRONG])
def test_the_bindings_refuse_what_they_would_read_at_the_wrong_width(wrong, message):
    numbers = torch.tensor([0.1, -1.0, 0.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    right = {"pre": torch.zeros(2, 30), "ft": torch.zeros(2, 30), "numbers": numbers, "uniform": torch.zeros(2)}
    torch.ops.svdecode_compiled.steer_sample(**right)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.svdecode_compiled.steer_sample(**right | wrong)


@pytest.mark.skipif(not CPU, reason="the C++ operators are not built")
def test_the_bindings_refuse_labels_and_results_of_another_dtype():
    numbers = torch.tensor([0.1, -1.0, 0.0, 1.0, 0.5, 4.0], dtype=torch.float64)
    arguments = (torch.zeros(2, 30), torch.zeros(2, 30), numbers, None)
    fused_steer = torch.ops.svdecode_compiled.fused_steer
    with pytest.raises(RuntimeError, match="labels must be Long, got Int"):
        fused_steer(*arguments, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="the tensor of log-probs must be float32, got Double"):
        fused_steer(*arguments, None, torch.zeros(2, 30, dtype=torch.float64))


def run_python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


REPORT = """
import torch, svdecode
x = torch.randn(2, 50)
print(svdecode.backends()["cpu"])
print(svdecode.fused_steer(x, x + 1).kl.shape)
try:
    svdecode.fused_steer(x, x, backend="cpu")
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("content", [b"not a library", None])
def test_a_library_that_does_not_load_is_reported_and_not_needed(content, tmp_path):
    library = tmp_path / "_compiled.so"
    if content:
        library.write_bytes(content)
    text = run_python(REPORT, SVDECODE_LIBRARY=str(library), SVDECODE_CUDA_EMULATION="")
    assert "available=False" in text
    assert "torch.Size([2])" in text
    assert "refused: backend='cpu' is not available: _compiled.so does not load" in text


@pytest.mark.skipif(not CPU, reason="the C++ operators are not built")
def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="no instruction set 'sse9'; the best is"):
        compiled.instruction_set("sse9")
    assert compiled.instruction_set() in ("base", "avx2", "avx512")


@pytest.mark.skipif(not CPU, reason="the C++ operators are not built")
def test_a_cpu_uses_them_unless_told_otherwise(monkeypatch):
    from svdecode.ops import backends
    from svdecode.ops.backends import choose

    monkeypatch.setattr(backends._PREFERRED, "name", None)
    x = torch.zeros(1, 3)
    assert choose(None, x, x.bfloat16()) == "cpu"
    assert choose(None, x.double(), x) == "reference"
    assert choose("reference", x, x) == "reference"
