"""Small kernels in PTX text, for the interpreter's own tests."""

from __future__ import annotations

import struct

import numpy as np

from ptx.machine import Machine
from ptx.memory import Memory

MODULE = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry planted(.param .u64 planted_param_0, .param .u64 planted_param_1)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<19>;
    .reg .b64 %rd<19>;
    .shared .align 16 .b8 space[{shared}];
    {registers}
    ld.param.u64 %rd1, [planted_param_0];
    ld.param.u64 %rd2, [planted_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd2, %rd3;
    {body}
    ret;
}}
"""
# %rd1 the input, %rd2 the output, %r1 the thread, %rd4 the output of the thread as 32-bit words.


def run(
    body: str, given: np.ndarray, result: np.ndarray, blocks: int = 1, shared: int = 256, registers: str = "", **options
) -> np.ndarray:
    """Run a body on an input and an output array, with `threads=` (32), `order=`, `at_once=` and the options of `Machine`."""
    threads = options.pop("threads", 32)
    where = {name: options.pop(name) for name in ("order", "at_once") if name in options}
    machine = Machine(MODULE.format(threads=threads, body=body, shared=shared, registers=registers), **options)
    memory, parameters = Memory(), []
    for array in (given, result):
        memory.add(array.ctypes.data, array.view(np.uint8), min(array.itemsize, 4))
        parameters.append(struct.pack("<Q", array.ctypes.data))
    machine.launch((blocks,), parameters, memory, **where)
    return result


def apply(instructions: str, result: str, *inputs: np.ndarray, **options) -> np.ndarray:
    """One result for each element of the inputs: `%x0`, `%x1`... to `%y`, a register of the type `result` of numpy."""
    count = len(inputs[0])
    threads = -(-count // 32) * 32
    body, registers = [], [f".reg .b{8 * np.dtype(result).itemsize} %y;"]
    offset, packed = 0, []
    for n, x in enumerate(inputs):
        size = x.dtype.itemsize
        registers.append(f".reg .b{8 * size} %x{n};")
        body += [f"mul.wide.u32 %rd5, %r1, {size};", "add.s64 %rd6, %rd1, %rd5;"]
        body.append(f"ld.global.b{8 * size} %x{n}, [%rd6+{offset}];")
        padded = np.resize(x, threads).tobytes()
        packed.append(padded)
        offset += len(padded)
    size = np.dtype(result).itemsize
    body += [instructions, f"mul.wide.u32 %rd5, %r1, {size};", "add.s64 %rd6, %rd2, %rd5;"]
    body.append(f"st.global.b{8 * size} [%rd6], %y;")
    given = np.frombuffer(bytearray(b"".join(packed)), np.uint8)
    out = run(
        "\n".join(body), given, np.zeros(threads, result), threads=threads, registers=" ".join(registers), **options
    )
    return out[:count]
