"""The compiled operators, backends `cpu` and `cuda`: `csrc/` behind torch.ops, called as `reference.py` and the kernels are.

The library is written against torch's stable ABI and holds the CPU operators and, where it was built with nvcc, the CUDA
kernels. It may be missing (no compiler when svdecode was installed) or refuse to load: WHY_MISSING says so, and everything
else works without it. The Triton kernels compute what the CUDA part lacks (steered_nll, steering_vector, the gradients).

SVDECODE_LIBRARY names another library file to load. SVDECODE_CUDA_EMULATION names one built from the CUDA sources for the host
(`csrc/emulation/`); backend "cuda" then runs on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from svdecode.constants import KL
from svdecode.ops.mu import number_or_rows
from svdecode.ops.sources_digest import sources_digest

# csrc/bindings.cpp has the same.
OWN_STRENGTH, RETURN_KL, DENSE, SAVE, NEED_PRE, NEED_FT, VECTOR = (1 << i for i in range(7))


CSRC = Path(__file__).parents[2] / "csrc"
"""The sources of the library, where svdecode runs from a clone."""


def _library() -> Path | None:
    """The library of operators beside this file; in a clone's root, which hides the installed package, that package's own."""
    override, here = os.environ.get("SVDECODE_LIBRARY"), Path(__file__).parent
    if override:
        return Path(override)
    installed = [Path(folder) / "svdecode" / "ops" for folder in sys.path if folder] if CSRC.is_dir() else []
    return next((path for folder in (here, *installed) for path in sorted(folder.glob("_compiled*.so"))), None)


def _why_missing(library: Path | None) -> str | None:
    """Load the library; why the operators are not here, or None."""
    if library is None:
        recorded = Path(__file__).with_name("not_compiled.txt")  # by setup.py
        reason = (
            recorded.read_text()
            if recorded.is_file()
            else "they are built by pip install, where there is a C++ compiler"
        )
        return f"svdecode is here without its compiled operators: {reason}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built for another platform, or for a torch that this one is not compatible with
        return f"{library.name} does not load: {error.__cause__ or error}"
    if library.parent != Path(__file__).parent and CSRC.is_dir() and sources() != sources_digest(CSRC):
        return f"{library} was built from other sources than those in this folder: pip install . again"
    return None


def sources() -> str:
    """The digest of the sources that the library was built from."""
    return torch.ops.svdecode_compiled.sources()


# Constants, not functions: torch.compile reads them while it traces.
LIBRARY = _library()
"""The file of the compiled operators, or None."""
WHY_MISSING = _why_missing(LIBRARY)
"""Why backend "cpu" is not here, or None."""
CUDA_IS_EMULATED = bool(os.environ.get("SVDECODE_CUDA_EMULATION"))
"""Whether backend "cuda" runs on CPU tensors."""
if CUDA_IS_EMULATED:
    torch.ops.load_library(os.environ["SVDECODE_CUDA_EMULATION"])
HAS_CUDA = CUDA_IS_EMULATED or (WHY_MISSING is None and torch.ops.svdecode_compiled.has_cuda())
"""Whether the CUDA kernels are here; a GPU may still be missing."""


def why_cuda_missing() -> str | None:
    """Why backend "cuda" cannot run here, or None."""
    if WHY_MISSING is not None and not HAS_CUDA:
        return WHY_MISSING
    if not HAS_CUDA:
        return "svdecode was installed without its CUDA kernels: they take nvcc and a CUDA build of torch; install it again"
    return None if CUDA_IS_EMULATED or torch.cuda.is_available() else "torch sees no GPU"


def instruction_set(wanted: str = "") -> str:
    """The instruction set of the CPU operators in use: avx512, avx2 or base; `wanted` chooses another that this CPU has."""
    return torch.ops.svdecode_compiled.instruction_set(wanted)


@functools.lru_cache(maxsize=1024)
def _numbers(
    alpha: float, penalty: float, eps: float, direction: str, mu: float = 0.0, flags: int = 0, *sampling: float
) -> Tensor:
    """A call's numbers in the order of csrc/bindings.cpp: one tensor, kept for next time, costs less than nine arguments."""
    return torch.tensor([alpha, penalty, eps, direction == KL, mu, flags, *sampling], dtype=torch.float64, device="cpu")


def _flat(values: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if values is None else values.to(dtype).contiguous()


def out_of_memory(error: RuntimeError, logits: Tensor) -> RuntimeError:
    """What torch raises where memory runs out, for an error of the library; any other error as it is.

    torch's stable ABI reports a failed allocation without a reason, and tools that try smaller batches look for torch's words.
    """
    if "aoti_torch_empty" not in str(error):
        return error
    if logits.is_cuda:
        return torch.OutOfMemoryError(f"CUDA out of memory: the results for logits {tuple(logits.shape)} do not fit")
    return RuntimeError(f"DefaultCPUAllocator: can't allocate memory: results for logits {tuple(logits.shape)}")


class Operators:
    """The operators of one library, named and called as those of `reference.py`."""

    def __init__(self, library) -> None:
        self._fused_steer = library.fused_steer.default
        self._steer_sample = library.steer_sample.default
        self._steer_topk = library.steer_topk.default
        self._steered_nll = library.steered_nll.default
        self._steering_vector = library.steering_vector.default
        self._backward = library.backward.default

    def fused_steer(
        self,
        logits_pre,
        logits_ft,
        mu,
        labels,
        alpha,
        penalty,
        direction,
        eps,
        return_kl,
        out=None,
        save=True,
        dense=True,
    ) -> tuple[Tensor | None, ...]:
        """(logprobs, mu, num_kept, kl, mu_star, moments, saved), None for the unasked."""
        number, rows = (mu, None) if type(mu) is float else number_or_rows(mu, logits_ft)
        flags = return_kl * RETURN_KL + dense * DENSE + save * SAVE + (mu is None) * OWN_STRENGTH
        numbers = _numbers(alpha, penalty, eps, direction, number, flags)
        if rows is None and labels is None and out is None:
            return self._fused_steer(logits_pre, logits_ft, numbers)
        result = self._fused_steer(logits_pre, logits_ft, numbers, rows, _flat(labels, torch.int64), out)
        return result if out is None else (out, *result[1:])

    def optimal_strength(self, logits_pre, logits_ft, labels, alpha, direction, eps) -> tuple[Tensor, ...]:
        """(mu_star, moments, saved): the scalars of `fused_steer` alone."""
        settings = (alpha, -math.inf, direction, eps, False)
        return self.fused_steer(logits_pre, logits_ft, 0.0, labels, *settings, dense=False)[4:]

    def steered_nll(self, logits_pre, logits_ft, labels, mu, alpha, penalty, direction) -> tuple[Tensor, Tensor]:
        """(nll (..., M), saved)."""
        numbers = _numbers(alpha, penalty, 0.0, direction)
        return self._steered_nll(logits_pre, logits_ft, _flat(labels, torch.int64), _flat(mu), numbers)

    def steering_vector(self, logits_pre, logits_ft, alpha, direction) -> tuple[Tensor, Tensor]:
        """(delta (..., V), saved)."""
        return self._steering_vector(logits_pre, logits_ft, _numbers(alpha, 0.0, 0.0, direction))

    def steer_sample(
        self, logits_pre, logits_ft, mu, uniform, temperature, top_k, top_p, alpha, penalty, direction
    ) -> tuple[Tensor, Tensor]:
        """(tokens, logprobs)."""
        number, rows = number_or_rows(mu, logits_ft)
        top_k = 0 if top_k is None or top_k >= logits_ft.shape[-1] else top_k
        sampling = (temperature, top_k, 1.0 if top_p is None else top_p)
        numbers = _numbers(alpha, penalty, 0.0, direction, number, 0, *sampling)
        uniform = logits_ft.new_empty(0, dtype=torch.float32) if uniform is None else uniform.contiguous()
        return self._steer_sample(logits_pre, logits_ft, numbers, uniform, rows)

    def steer_topk(self, logits_pre, logits_ft, mu, k, alpha, penalty, direction) -> tuple[Tensor, Tensor]:
        """(tokens (..., k), logprobs (..., k))."""
        number, rows = number_or_rows(mu, logits_ft)
        numbers = _numbers(alpha, penalty, 0.0, direction, number, 0, 1.0, k)
        return self._steer_topk(logits_pre, logits_ft, numbers, rows)

    def fused_steer_backward(
        self, grad_logprobs, grad_mu, grad_kl, grad_mu_star, grad_moments, logits_pre, logits_ft, mu, labels, strength, kl,
        moments, saved, alpha, penalty, direction, eps, need_pre, need_ft,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dL/dlogits_pre, dL/dlogits_ft, dL/dmu (...))."""
        grads = (_flat(grad) for grad in (grad_mu, grad_kl, grad_mu_star, grad_moments))
        own = mu is None and labels is not None
        return self._gradients(
            (logits_pre, logits_ft, saved, grad_logprobs, *grads, None, _flat(strength), _flat(labels, torch.int64)),
            # What was not asked for is an empty tensor.
            (None if grad_kl is None else kl, None if labels is None else moments, None),
            (alpha, penalty, eps, direction),
            own * OWN_STRENGTH + need_pre * NEED_PRE + need_ft * NEED_FT,
        )

    def steered_nll_backward(
        self, grad_nll, logits_pre, logits_ft, labels, mu, nll, saved, alpha, penalty, direction, need_pre, need_ft
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dL/dlogits_pre, dL/dlogits_ft, dL/dmu (M,))."""
        grad_pre, grad_ft, per_row = self._gradients(
            (logits_pre, logits_ft, saved, *(None,) * 5, _flat(grad_nll), _flat(mu), _flat(labels, torch.int64)),
            (None, None, nll),
            (alpha, penalty, 0.0, direction),
            need_pre * NEED_PRE + need_ft * NEED_FT,
        )
        return grad_pre, grad_ft, per_row.reshape(-1, mu.shape[0]).sum(0)

    def steering_vector_backward(
        self, grad_delta, logits_pre, logits_ft, saved, alpha, direction, need_pre, need_ft
    ) -> tuple[Tensor, Tensor]:
        """(dL/dlogits_pre, dL/dlogits_ft)."""
        return self._gradients(
            (logits_pre, logits_ft, saved, grad_delta, *(None,) * 7),
            (None, None, None),
            (alpha, -math.inf, 0.0, direction),
            VECTOR + need_pre * NEED_PRE + need_ft * NEED_FT,
        )[:2]

    def _gradients(self, tensors, outputs, settings, flags) -> list[Tensor]:
        grads = self._backward(*tensors, *outputs, _numbers(*settings, 0.0, flags))
        return [tensors[0].new_empty(0) if grad is None else grad for grad in grads]


@functools.cache
def _operators(emulated: bool) -> Operators:
    return Operators(torch.ops.svdecode_emulated if emulated else torch.ops.svdecode_compiled)


_IN_CUDA = ("fused_steer", "optimal_strength", "steer_sample", "steer_topk")


def implementation(backend: str, operator: str) -> Callable | None:
    """The function that computes an operator on `cpu` or `cuda`; None where the CUDA part does not have it."""
    if backend == "cpu":
        return getattr(_operators(emulated=False), operator)
    return getattr(_operators(emulated=CUDA_IS_EMULATED), operator) if operator in _IN_CUDA else None
