"""Where a row of a strided (..., V) tensor begins: any strides, no copy, 64-bit offsets.

Leading dimensions are merged as far as the strides of both inputs allow and what is left is padded to three, so that one
expression addresses slices such as logits[:, :-1], transposed batches and expanded rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LEVELS = 3


class RowLayout(NamedTuple):
    """Arguments that `row_start` needs: the sizes of the two inner levels and three strides a tensor."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def arguments(self) -> tuple[int, ...]:
        """All of it in the order in which the kernels take it."""
        return (*self.sizes, *(stride for strides in self.strides for stride in strides))

    @property
    def pair_arguments(self) -> tuple[int, ...]:
        """The same for the two inputs alone."""
        return (*self.sizes, *self.strides[0], *self.strides[1])


def row_layout(*tensors: Tensor) -> tuple[list[Tensor], RowLayout]:
    """The tensors, all of one (..., V) shape, and the layout of their common rows.

    Copies are made only where a last dimension is not contiguous or where more than three leading dimensions cannot be merged.
    """
    tensors = [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]
    levels = _merge(tensors)
    if len(levels) > LEVELS:
        tensors = [x.contiguous() for x in tensors]
        levels = _merge(tensors)
    levels = [(1, *(0,) * len(tensors))] * (LEVELS - len(levels)) + levels
    sizes, *strides = zip(*levels, strict=True)
    return tensors, RowLayout(sizes[1:], tuple(strides))


def _merge(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    """(size, stride of each tensor) of the leading dimensions, outermost first, merged where all tensors allow."""
    levels: list[tuple[int, ...]] = []
    leading = [x.stride()[:-1] for x in tensors]
    for size, *strides in zip(tensors[0].shape[:-1], *leading, strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1:] == tuple(size * stride for stride in strides):
            levels[-1] = (levels[-1][0] * size, *strides)
        else:
            levels.append((size, *strides))
    return levels


def on_device_of(tensor: Tensor) -> torch.cuda.device:
    """Launch on the device of the tensors, which need not be the current one; nothing to do on a CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@triton.jit
def row_start(row, size1, size2, stride0, stride1, stride2):
    """Offset in elements of a row, in 64 bits: rows * V passes 2^31 at 16,384 rows of 131,072 tokens."""
    level2 = row % size2
    level1 = (row // size2) % size1
    level0 = row // (size1 * size2)
    return level0.to(tl.int64) * stride0 + level1.to(tl.int64) * stride1 + level2.to(tl.int64) * stride2
