"""The logits that the scripts in this folder time the operators on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CACHE_BYTES = {"cuda": 400e6, "cpu": 100e6}
"""More than the caches hold, so that each call reads its inputs from memory."""
TIMES_THE_L2 = 3
"""On a GPU also at least so many times its L2 cache, in case it is larger than those of today."""
MOST_PAIRS = {"cuda": 4096, "cpu": 128}
LIKELY = 2
"""Tokens that share the mass of a peaked row, as of a language model most of the time."""


def likely_token(index: int, vocabulary: int) -> int:
    """The likely tokens of a row lie far apart, in tiles and splits of their own."""
    return (2 * index + 1) * vocabulary // (2 * LIKELY)


def peaked_logits(
    rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (rows, vocabulary) of a pre-trained and of a warm-started model that prefers LIKELY tokens."""
    generator = torch.Generator(device).manual_seed(seed)
    ft = torch.empty(rows, vocabulary, device=device).normal_(generator=generator)
    for index in range(LIKELY):
        ft[:, likely_token(index, vocabulary)] = 20.0 - 0.5 * index
    pre = torch.empty_like(ft).normal_(generator=generator).mul_(0.2).add_(ft)
    return pre.to(dtype), ft.to(dtype)


def cache_bytes(device: str) -> float:
    """Bytes that the inputs of one rotation have together at least."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    return max(CACHE_BYTES[device], TIMES_THE_L2 * l2)


def rotation(rows: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Pairs of peaked logits, together larger than the caches."""
    size = 2 * rows * vocabulary * dtype.itemsize
    large = cache_bytes(device)
    count = min(max(4, math.ceil(large / size)), MOST_PAIRS[device])
    if device == "cuda" and size > large:
        count = 2
    return [peaked_logits(rows, vocabulary, dtype, device, seed=number % 4) for number in range(count)]


def gold_labels(rows: int, vocabulary: int, device: str = "cpu") -> Tensor:
    """The most likely token of each row."""
    return torch.full((rows,), likely_token(0, vocabulary), device=device)
