"""mu as the kernels take it: a number, one value per row, or each row's own mu_star."""

from __future__ import annotations

import torch
from torch import Tensor


def as_tensor(mu: float | Tensor | None) -> Tensor | None:
    """mu as the schemas of torch.ops.svdecode take it: a number becomes a 0-dim CPU tensor."""
    if mu is None or isinstance(mu, Tensor):
        return mu
    if torch.compiler.is_compiling():
        # A product is what torch.compile turns into a graph input; it would take scalar_tensor's for a constant.
        return torch.ones((), dtype=torch.float64) * mu
    return torch.scalar_tensor(mu, dtype=torch.float64)


def number_or_rows(mu: float | Tensor | None, logits: Tensor) -> tuple[float, Tensor | None]:
    """(number, float32 values of all rows of the logits or None). None, which stands for mu_star, gives (0.0, None).

    A 0-dim CPU tensor is a number, so that reading it never waits for a GPU.
    """
    if not isinstance(mu, Tensor):
        return mu or 0.0, None
    if mu.dim() == 0 and mu.device.type == "cpu":
        return mu.item(), None
    return 0.0, mu.float().expand(logits.shape[:-1]).reshape(-1).contiguous()
