"""Rows of logits for the tests: what a language model produces, and the edges of the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAN, INF = math.nan, math.inf


def model_rows(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """(logits_pre, logits_ft): heavy-tailed rows with a few likely tokens, two models that mostly agree."""
    base = torch.randn(*shape, dtype=torch.float64) * spread
    pre = base + 0.3 * torch.randn(*shape, dtype=torch.float64) + 1.7  # an offset changes no probability
    ft = base + 0.5 * torch.randn(*shape, dtype=torch.float64)
    return pre.to(dtype), ft.to(dtype)


def kept_labels(ft: Tensor) -> Tensor:
    """Labels inside K for most rows, outside it for every third, ignored for every fifth."""
    labels = ft.double().argmax(-1).flatten()
    labels[2::3] = ft.double().argmin(-1).flatten()[2::3]
    labels[4::5] = -100
    return labels.reshape(ft.shape[:-1])


def edge_rows(vocabulary: int = 12) -> dict[str, tuple[Tensor, Tensor]]:
    """Named (1, V) pairs, each an edge of method.md section 3."""
    pre, ft = model_rows(1, vocabulary, spread=1.0)

    def edited(which: str, **values: float) -> tuple[Tensor, Tensor]:
        a, z = pre.clone(), ft.clone()
        for target in which.split():
            for position, value in values.items():
                (a if target == "pre" else z)[0, int(position[1:])] = value
        return a, z

    top_excluded = pre.clone()
    top_excluded[0, ft.argmax()] = -INF
    whole = {f"v{i}": -INF for i in range(vocabulary)}
    return {
        "plain": (pre, ft),
        "identical models": (ft, ft.clone()),
        "flat": (torch.zeros_like(pre), torch.zeros_like(ft)),
        "one-hot": edited("ft", v3=200.0),
        "large logits": (pre * 1e3, ft * 1e3),
        "offset": (pre + 500.0, ft - 500.0),
        "ft -inf": edited("ft", v1=-INF, v5=-INF),
        "pre -inf": edited("pre", v1=-INF, v5=-INF),
        "both -inf": edited("pre ft", v1=-INF, v5=-INF),
        "ft one finite": edited("ft", **{k: v for k, v in whole.items() if k != "v4"}),
        "ft all -inf": edited("ft", **whole),
        "pre all -inf": edited("pre", **whole),
        "ft nan": edited("ft", v7=NAN),
        "pre nan": edited("pre", v7=NAN),
        "pre nan where ft -inf": (edited("pre", v7=NAN)[0], edited("ft", v7=-INF)[1]),
        "ft +inf": edited("ft", v0=INF),
        "pre +inf": edited("pre", v0=INF),
        "pre +inf where ft -inf": (edited("pre", v0=INF)[0], edited("ft", v0=-INF)[1]),
        "pre -inf at the top of ft": (top_excluded, ft),
        "ties": (torch.zeros_like(pre), torch.tensor([[2.0] * 3 + [0.0] * (vocabulary - 3)], dtype=ft.dtype)),
    }


INVALID = {name for name in edge_rows() if "nan" in name or "+inf" in name or "all -inf" in name}
