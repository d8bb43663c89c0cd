"""Where a row of a strided (..., V) tensor begins: any strides, no copy, 64-bit offsets.

Leading dimensions are merged as far as the strides of both inputs allow and what is left is padded to three, so that one
expression addresses slices such as logits[:, :-1], transposed batches and expanded rows.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

LEVELS = 3


class RowLayout:
    """Sizes of the two inner levels, and three strides for each tensor, as the tuples that `row_start` takes."""

    def __init__(self, *tensors: Tensor) -> None:
        """Lay out tensors of one (..., V) shape.

        Copies are made only where a last dimension is not contiguous or more than three leading dimensions cannot be merged.
        """
        self._alike = all(map(Tensor.is_contiguous, tensors))
        if self._alike:  # the usual call: rows one after another, the same in all tensors
            vocabulary = tensors[0].shape[-1]
            rows = tensors[0].numel() // vocabulary
            self.tensors = tensors
            self.sizes = (1, rows)
            self.strides = ((0, 0, vocabulary if rows > 1 else 0),) * len(tensors)
            return
        laid_out = [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]
        levels = _merge(laid_out)
        if len(levels) > LEVELS:
            laid_out = [x.contiguous() for x in laid_out]
            levels = _merge(laid_out)
        levels = [(1, *(0,) * len(laid_out))] * (LEVELS - len(levels)) + levels
        sizes, *strides = zip(*levels, strict=True)
        self.tensors = tuple(laid_out)
        self.sizes = sizes[1:]
        self.strides = tuple(strides)

    def of(self, *tensors: Tensor) -> tuple[tuple[int, ...], ...]:
        """The kernel argument for some of the tensors: sizes, then the strides of each."""
        if self._alike:
            return (self.sizes, *self.strides[:1] * len(tensors))
        places = {id(x): strides for x, strides in zip(self.tensors, self.strides, strict=True)}
        return (self.sizes, *(places[id(x)] for x in tensors))


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


_HERE = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the device of the tensors, which need not be the current one; nothing to do where it is, or on a CPU."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


@triton.jit
def row_start(row, sizes, strides):
    """Offset in elements of a row, in 64 bits: rows * V passes 2^31 at 16,384 rows of 131,072 tokens."""
    level2 = row % sizes[1]
    level1 = (row // sizes[1]) % sizes[0]
    level0 = row // (sizes[0] * sizes[1])
    return level0.to(tl.int64) * strides[0] + level1.to(tl.int64) * strides[1] + level2.to(tl.int64) * strides[2]
