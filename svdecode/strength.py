"""mu as the kernels take it: a number, one value a row, or each row's own mu_star."""

from __future__ import annotations

import torch
from torch import Tensor


def number_or_rows(mu: float | Tensor | None, rows: torch.Size) -> tuple[float, Tensor | None]:
    """(number, per-row float32 values or None). None, which stands for mu_star, gives (0.0, None).

    A 0-dim CPU tensor is a number, so that reading it never waits for a GPU.
    """
    if not isinstance(mu, Tensor):
        return mu or 0.0, None
    if mu.dim() == 0 and mu.device.type == "cpu":
        return mu.item(), None
    return 0.0, mu.float().expand(rows).reshape(-1).contiguous()
