"""Kernels whose speed is known, to check the model by: copy, add and softmax reach about the copy bandwidth on real cards."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from kernel_counts import Kernel, read_kernel
from kernel_work import Work
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Copy."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    tl.store(out_ptr + index, tl.load(x_ptr + index, mask=inside), mask=inside)


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Add two bfloat16 vectors in float32."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    x = tl.load(x_ptr + index, mask=inside).to(tl.float32)
    tl.store(out_ptr + index, x + tl.load(y_ptr + index, mask=inside).to(tl.float32), mask=inside)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Softmax of rows that a program holds in registers."""
    index = tl.arange(0, BLOCK)
    row = tl.program_id(0) * size
    x = tl.load(x_ptr + row + index, mask=index < size, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row + index, (e / tl.sum(e, 0)).to(tl.bfloat16), mask=index < size)


class Baseline(NamedTuple):
    """A kernel, its block, warps, types of pointers that are not to bfloat16, and bytes read and written per element."""

    kernel: object
    block: int
    warps: int
    floats: tuple[str, ...]
    work: Work


BASELINES = {
    "copy": Baseline(copy_kernel, 1024, 4, (), Work(1024, 2, 2)),
    "add": Baseline(add_kernel, 1024, 4, ("out_ptr",), Work(1024, 4, 4)),
    "softmax, 4,096": Baseline(softmax_kernel, 4096, 4, (), Work(4096, 2, 2)),
    "softmax, 16,384": Baseline(softmax_kernel, 16384, 16, (), Work(16384, 2, 2)),
}


def compile_baseline(baseline: Baseline, target: int) -> Kernel:
    """The machine code of one of them."""
    names = baseline.kernel.arg_names
    types = {name: "*fp32" if name in baseline.floats else "*bf16" for name in names if name.endswith("_ptr")}
    source = ASTSource(
        fn=baseline.kernel,
        signature={**types, "size": "i32", "BLOCK": "constexpr"},
        constexprs={(names.index("BLOCK"),): baseline.block},
        attrs={(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name != "BLOCK"},
    )
    options = {"num_warps": baseline.warps}
    return read_kernel(triton.compile(source, target=GPUTarget("cuda", target, 32), options=options))
