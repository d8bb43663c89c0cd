"""Kernels that miss every target of `test_counts.py`, and a copy whose machine code is known, counted as ours are.

Run as a script: it prints what `bench/counts.py --json` writes. (Compiling needs a process without TRITON_INTERPRET.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import compile_report
import counts
import kernel_counts
import triton
import triton.language as tl
from kernel_work import OPERATORS, SPLIT, STREAMS, Launch, Operator, Work, one, splits


@triton.jit
def copy_kernel(pre_ptr, pre_grad_out_ptr, vocabulary, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(
        pre_grad_out_ptr + token,
        tl.load(pre_ptr + token, mask=token < vocabulary // 16 * 16),
        mask=token < vocabulary // 16 * 16,
    )


@triton.jit
def wasteful_kernel(pre_ptr, ft_ptr, out_ptr, vocabulary, DROP: tl.constexpr, BLOCK: tl.constexpr):
    """Ten maxima and ten products per token where one would do."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pre_ptr + token, mask=token < vocabulary // 16 * 16, other=0.0).to(tl.float32)
    y = tl.load(ft_ptr + token, mask=token < vocabulary // 16 * 16, other=0.0).to(tl.float32)
    for i in tl.static_range(10):
        x = tl.maximum(x * y, y - i)
        y = tl.minimum(y * x, x + i)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x + y, 0))


@triton.jit
def late_kernel(pre_ptr, ft_ptr, out_ptr, vocabulary, num_splits, top_k, DROP: tl.constexpr, BLOCK: tl.constexpr):
    """Four divisions before the first load, and the second input is loaded when the first has come."""
    program = tl.program_id(0)
    for _ in tl.static_range(4):
        program = program // num_splits + program % top_k
    token = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pre_ptr + token, mask=token < vocabulary // 16 * 16, other=0.0).to(tl.float32)
    top = tl.max(x, 0)
    y = tl.load(ft_ptr + token, mask=(token < vocabulary // 16 * 16) & (top > 0), other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.exp(x - top) * y, 0))


@triton.jit
def spilling_kernel(pre_ptr, ft_ptr, out_ptr, vocabulary, DROP: tl.constexpr, BLOCK: tl.constexpr):
    """Holds more than the registers that `LAUNCH` allows: 16,384 tokens, 256 values of a thread."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pre_ptr + token, mask=token < vocabulary // 16 * 16, other=0.0).to(tl.float32)
    y = tl.load(ft_ptr + token, mask=token < vocabulary // 16 * 16, other=0.0).to(tl.float32)
    top = tl.max(x, 0) + tl.max(y, 0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.exp(x - top) * tl.exp(y - top), 0))


@triton.jit
def narrow_kernel(pre_ptr, ft_ptr, out_ptr, vocabulary, num_splits, DROP: tl.constexpr, BLOCK: tl.constexpr):
    """Begins anywhere, so that each token is loaded by itself."""
    token = tl.program_id(0) * num_splits + tl.arange(0, BLOCK)
    x = tl.load(pre_ptr + token, mask=token < vocabulary // 16 * 16, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x, 0))


READ = Work(SPLIT, read=4)
WORK = {
    copy_kernel: ({"BLOCK": 1024}, Work(1024, read=2, written=2)),
    wasteful_kernel: ({"DROP": True, "BLOCK": SPLIT}, READ),
    late_kernel: ({"DROP": True, "BLOCK": SPLIT}, READ),
    spilling_kernel: ({"DROP": True, "BLOCK": 16384}, Work(16384, read=4)),
}


def main() -> None:
    variants = [
        compile_report.Named(kernel, f"{kernel.fn.__name__}[]", constants, 0) for kernel, (constants, _) in WORK.items()
    ]
    kernel_counts.variants = lambda: variants
    STREAMS.clear()
    STREAMS.update({kernel.fn.__name__: lambda _, work=work: work for kernel, (_, work) in WORK.items()})
    counts.BACKWARD = ("wasteful_kernel", "late_kernel")
    launches = [
        Launch("wasteful_kernel", READ, READ, splits),
        Launch("late_kernel", READ, READ, splits),
        Launch("late_kernel", READ, READ, one),
        Launch("wasteful_kernel", READ, READ, one),
    ]
    OPERATORS["planted"] = Operator(4, launches)
    found = counts.collect(["H100"], [f"{kernel.fn.__name__}[" for kernel in WORK], ["planted"])
    narrow = compile_report.Named(narrow_kernel, "narrow_kernel[]", {"DROP": True, "BLOCK": SPLIT}, 0)
    try:
        kernel_counts.count(kernel_counts.compile_triton(narrow, counts.TARGET), Work(SPLIT, read=2))
    except ValueError as error:
        found["narrow"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
