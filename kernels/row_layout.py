"""Where a row of a strided (..., V) tensor begins, in 64 bits, and what the compiler may know of its alignment.

Leading dimensions are merged as far as the strides of all tensors allow and what is left is padded to three, so that one
expression addresses slices such as logits[:, :-1], transposed batches and expanded rows without a copy.

Triton arranges a tile over threads by the alignment that it sees, and the arrangement decides the order of a row's sums. What
it sees therefore follows from V and the dtypes alone (ALIGN), not from the strides and pointers of one call: a row would
otherwise have other results alone than in a batch.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.kernels.settings import LOAD_BYTES, WARP_THREADS

LEVELS = 3
MOST_ALIGNED = 16
"""Tokens: the largest alignment that the kernels are told of."""


class RowLayout:
    """How kernels address the rows of tensors of one (..., V) shape.

    Attributes:
        tensors: the given ones, or copies of those that no kernel can read as they are: a last dimension that is not
            contiguous, more than three leading dimensions that cannot be merged, rows that are not aligned although V is.
        align: tokens by which every row's beginning and V are divisible, where that gives loads of 16 bytes; else 1.
        lanes: tokens that one load instruction of a warp covers.
    """

    def __init__(self, *tensors: Tensor) -> None:
        """Lay out tensors."""
        vocabulary = tensors[0].shape[-1]
        self.align, self.lanes = _alignment(vocabulary, *[x.itemsize for x in tensors])
        self._alike = all(map(Tensor.is_contiguous, tensors)) and (
            self.align == 1 or not any(x.data_ptr() % LOAD_BYTES for x in tensors)
        )
        if self._alike:  # the usual call: rows one after another, the same in all tensors
            self.tensors = tensors
            self.sizes = (1, 1)
            self.strides = ((vocabulary if tensors[0].numel() > vocabulary else 0, 0, 0),) * len(tensors)
            return
        laid_out = [x if self._readable(x) else _copied(x) for x in tensors]
        levels = _merge(laid_out)
        if len(levels) > LEVELS:
            laid_out = [_copied(x) for x in laid_out]
            levels = _merge(laid_out)
        # Padded at the end: an ordinary batch has sizes (1, 1), which Triton takes for constants.
        levels += [(1, *(0,) * len(laid_out))] * (LEVELS - len(levels))
        sizes, *strides = zip(*levels, strict=True)
        self.tensors = tuple(laid_out)
        self.sizes = sizes[1:]
        self.strides = tuple(strides)

    def _readable(self, x: Tensor) -> bool:
        """Whether the kernels can read a tensor without a copy."""
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            return False
        if self.align == 1:
            return True
        unit = LOAD_BYTES // x.element_size()
        strides = (stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
        return not (x.data_ptr() % LOAD_BYTES or any(stride % self.align or stride % unit for stride in strides))

    def of(self, *tensors: Tensor) -> tuple[tuple[int, ...], ...]:
        """The kernel argument for some of the tensors: sizes, then the strides of each."""
        if self._alike:
            return (self.sizes, *self.strides[:1] * len(tensors))
        places = {id(x): strides for x, strides in zip(self.tensors, self.strides, strict=True)}
        return (self.sizes, *(places[id(x)] for x in tensors))


@functools.lru_cache(maxsize=256)
def _alignment(vocabulary: int, *sizes: int) -> tuple[int, int]:
    """(align, lanes) for elements of these sizes in bytes, logits_pre and logits_ft first."""
    align = 1 if vocabulary * min(sizes) % LOAD_BYTES else math.gcd(vocabulary, MOST_ALIGNED)
    return align, WARP_THREADS * (LOAD_BYTES // max(sizes[:2]) if align > 1 else 1)


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() would keep one whose storage is not aligned


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


@triton.jit
def row_pointer(ptr, row, sizes, strides, zero, ALIGN: tl.constexpr):
    """Pointer to a row's first token.

    `zero` is 0, which the compiler does not know: added last, it hides what it has learned of the strides.
    """
    return ptr + tl.multiple_of(row_start(row, sizes, strides) + zero, ALIGN)


@triton.jit
def logit_rows(pre_ptr, ft_ptr, row, layout, zero, ALIGN: tl.constexpr):
    """Pointers to a row's first token in the logits of both models; `layout` has the sizes, then the strides of each tensor."""
    pre_row = row_pointer(pre_ptr, row, layout[0], layout[1], zero, ALIGN)
    ft_row = row_pointer(ft_ptr, row, layout[0], layout[2], zero, ALIGN)
    return pre_row, ft_row


@triton.jit
def within(token, vocabulary, ALIGN: tl.constexpr):
    """Whether tokens lie in the vocabulary; written so that masks of aligned loads are the same for all their tokens."""
    return token < vocabulary // ALIGN * ALIGN
