"""What svdecode is compared with: the method's formulas in plain PyTorch, and other packages' kernels as yardsticks.

The formulas leave out the handling of infinities and NaN. They write into a buffer where svdecode does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from svdecode.constants import ALPHA, EPS

MU = 0.5
COMPILE_MODE = {"cuda": "max-autotune-no-cudagraphs", "cpu": None}
"""No cudagraphs, which copy every input: `bench/operators.py --replay` captures all variants alike."""


def compiled(function: Callable, device: str) -> Callable:
    """torch.compile for the shape that it meets first, with the most thorough mode on a GPU."""
    return torch.compile(function, dynamic=False, mode=COMPILE_MODE[device])


def steering(a: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """(a, z, p, mean difference, kept, delta) in float32."""
    a, z = a.float(), z.float()
    p = torch.softmax(z, -1)
    d = z - a
    mean_d = (p * d).sum(-1, keepdim=True)
    kept = z >= z.amax(-1, keepdim=True) + math.log(ALPHA)
    return a, z, p, mean_d, kept, p * (d - mean_d)


def steered(z: Tensor, kept: Tensor, delta: Tensor, out: Tensor | None) -> Tensor:
    """Steered log-probs, in `out` where one is given and eager PyTorch computes them."""
    return torch.log_softmax(torch.where(kept, z + MU * delta, -math.inf), -1, out=out)


def divergence(a: Tensor, z: Tensor, mean_d: Tensor) -> Tensor:
    """KL of the warm-started from the pre-trained model."""
    return mean_d.squeeze(-1) - torch.logsumexp(z, -1) + torch.logsumexp(a, -1)


def moments(p: Tensor, kept: Tensor, delta: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N, D, H of each row's label."""
    masked = torch.where(kept, delta, 0.0)
    mean = (p * masked).sum(-1)
    n = masked.gather(-1, labels[:, None]).squeeze(-1) - mean
    return n, masked.square().sum(-1), (p * masked.square()).sum(-1) - mean.square()


def rival_logprobs(a: Tensor, z: Tensor, out: Tensor | None = None) -> Tensor:
    """Steered log-probs, nothing more."""
    _, z, _, _, kept, delta = steering(a, z)
    return steered(z, kept, delta, out)


def rival_dense(a: Tensor, z: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Steered log-probs and KL."""
    a, z, _, mean_d, kept, delta = steering(a, z)
    return steered(z, kept, delta, out), divergence(a, z, mean_d)


def rival_all(a: Tensor, z: Tensor, labels: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
    """Steered log-probs, KL and the moments N, D, H."""
    a, z, p, mean_d, kept, delta = steering(a, z)
    return steered(z, kept, delta, out), divergence(a, z, mean_d), *moments(p, kept, delta, labels)


def rival_scalars(a: Tensor, z: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The best strength of each row, and N, D, H."""
    _, _, p, _, kept, delta = steering(a, z)
    n, d, h = moments(p, kept, delta, labels)
    return n / (d + EPS), n, d, h


def rival_greedy(a: Tensor, z: Tensor) -> Tensor:
    """The most probable steered token."""
    return rival_logprobs(a, z).argmax(-1)


def logprobs_into(a: Tensor, z: Tensor, out: Tensor) -> Tensor:
    """`rival_logprobs` for torch.compile, which writes straight into `out`."""
    return out.copy_(rival_logprobs(a, z))


def dense_into(a: Tensor, z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """`rival_dense` for torch.compile."""
    logprobs, kl = rival_dense(a, z)
    return out.copy_(logprobs), kl


def all_into(a: Tensor, z: Tensor, labels: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    """`rival_all` for torch.compile."""
    logprobs, *rest = rival_all(a, z, labels)
    return out.copy_(logprobs), *rest


FORMULAS = {
    "dense": (rival_dense, dense_into),
    "greedy": (rival_greedy, rival_greedy),
    "scalars": (rival_scalars, rival_scalars),
}
"""By output: what eager PyTorch runs, and what torch.compile compiles."""


def yardsticks() -> dict[str, tuple[Callable, int]]:
    """Other packages' kernels where they are installed: name -> (call of both inputs, elements moved per element of one).

    They compute something else. How near they come to the memory's speed says how near one can come.
    """
    found = {}
    try:
        from quack.softmax import softmax
    except ImportError:
        pass
    else:
        found["quack softmax"] = (lambda a, z: softmax(z), 2)  # reads one input, writes as much in its dtype
    try:
        from liger_kernel.transformers.functional import liger_kl_div
    except ImportError:
        pass
    else:  # reads both inputs
        found["liger kl"] = (lambda a, z: liger_kl_div(a, z, reduction="batchmean", log_target=True), 2)
    return found
