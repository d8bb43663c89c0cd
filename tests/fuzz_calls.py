"""A random call of an operator, and its inputs, for `fuzz_operators.py`."""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from rows import kept_labels, model_rows
from torch import Tensor

LARGEST = {"cpu": 9000, "cuda": 2300, "triton": 1100}
"""Vocabularies."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call; `seed` stands for its random values. Fields that an operator does not have are not used."""

    operator: str
    backend: str
    shape: list[int]
    pre: str = "float32"
    ft: str = "float32"
    layout: str = "contiguous"
    default_dtype: str = "float32"
    alpha: float = 0.1
    penalty: float = -math.inf
    direction: str = "kl"
    mu: float | None = 0.7  # None: one per row
    spread: float = 1.0
    levels: int | None = None  # so many different logits per nat: ties
    planted: list[tuple[bool, int, float]] = dataclasses.field(default_factory=list)  # (in ft?, position, value)
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    k: int = 1
    seed: int = 0

    @property
    def settings(self) -> dict[str, object]:
        return {"alpha": self.alpha, "penalty": self.penalty, "direction": self.direction}

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
        """(logits_pre, logits_ft, labels, mu)."""
        torch.manual_seed(self.seed)
        pair = model_rows(*self.shape, spread=self.spread)
        pair = pair if self.levels is None else tuple((x * self.levels).round() / self.levels for x in pair)
        for in_ft, position, value in self.planted:
            pair[in_ft].view(-1)[position % pair[0].numel()] = value
        labels = kept_labels(pair[1].nan_to_num())
        mu = self.mu if self.mu is not None else torch.linspace(-1.0, 2.0, labels.numel()).reshape(labels.shape)
        pre, ft = (x.to(getattr(torch, name)) for x, name in zip(pair, (self.pre, self.ft), strict=True))
        return laid_out(pre, self.layout), laid_out(ft, self.layout), labels, mu


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; "padded" rows are not aligned."""
    if layout == "padded":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "transposed":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "every other row":
        return x.repeat_interleave(2, 0)[::2]
    return x.repeat_interleave(2, -1)[..., ::2] if layout == "last dimension strided" else x


def calls(operator: str, backend: str) -> st.SearchStrategy[Call]:
    """Calls of one operator on one backend."""
    dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
    return st.builds(
        Call,
        operator=st.just(operator),
        backend=st.just(backend),
        shape=st.tuples(
            st.lists(st.integers(1, 3), min_size=1, max_size=2),
            st.one_of(st.integers(1, 70), st.integers(1, LARGEST[backend.partition("-")[0]])),
        ).map(lambda parts: [*parts[0], parts[1]]),
        pre=dtypes,
        ft=dtypes,
        layout=st.sampled_from(["contiguous", "padded", "transposed", "every other row", "last dimension strided"]),
        default_dtype=st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
        alpha=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
        penalty=st.sampled_from([-math.inf, -7.5, -1.0, 0.0]),
        direction=st.sampled_from(["kl", "log_ratio"]),
        mu=st.sampled_from([0.7, 0.0, -1.5, None]),
        spread=st.sampled_from([0.1, 1.0, 4.0]),
        levels=st.sampled_from([None, None, 1, 4]),
        planted=st.lists(
            st.tuples(st.booleans(), st.integers(0, 30000), st.sampled_from([-math.inf] * 3 + [math.nan, math.inf])),
            max_size=5,
        ),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        top_k=st.sampled_from([None, 1, 5, 10**6]),
        top_p=st.sampled_from([None, 0.2, 0.95]),
        k=st.integers(1, 60),
        seed=st.integers(0, 10**6),
    )
