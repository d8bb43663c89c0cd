"""Registers, constants and special registers of an instruction, looked up once and read by every run of it.

A value is an array with one element for each thread, or one element where all threads have the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.dtypes import NUMPY, U32, U64, WARP, Fault, unsigned
from ptx.program import Instruction, Kernel

if TYPE_CHECKING:
    from ptx.threads import Threads

Read = Callable[["Threads"], np.ndarray]
Write = Callable[["Threads", np.ndarray, np.ndarray | None], None]
Run = Callable[["Threads", np.ndarray | None], None]

INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?$")
FLOAT_BITS = re.compile(r"(-?)0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})$")
ADDRESS = re.compile(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


class Operands:
    """Finds the operands of one kernel's instructions."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.slots = {name: slot for slot, name in enumerate(kernel.registers)}
        self.types = [NUMPY[kind] for kind in kernel.registers.values()]
        self.parameters = {parameter.name: parameter for parameter in kernel.parameters}

    def initial(self) -> list[np.ndarray]:
        """What registers hold before anything is written: a pattern that is NaN as a float and no sensible address."""
        patterns = {1: 0xA5, 2: 0x7FA5, 4: 0x7FA5A5A5, 8: 0x7FFA5A5A5A5A5A5A}
        held = {size: np.array([pattern], unsigned(size)) for size, pattern in patterns.items()}
        return [np.zeros(1, t) if t.kind == "b" else held[t.itemsize] for t in self.types]

    def read(self, text: str, kind: str) -> Read:
        """An operand as the numpy type of a PTX type."""
        dtype = NUMPY[kind]
        if text.startswith("!"):
            inner = self.read(text[1:], kind)
            return lambda threads: np.logical_not(inner(threads))
        if text in self.slots:
            return self._read_register(self.slots[text], dtype)
        if text.startswith("%"):
            return _special(text, dtype)
        value = np.array([self._constant(text, dtype)])
        return lambda threads: value

    def _read_register(self, slot: int, dtype: np.dtype) -> Read:
        held = self.types[slot]
        if held.itemsize == dtype.itemsize:

            def read(threads: Threads) -> np.ndarray:
                value = threads.registers[slot]
                return value if value.dtype is dtype else value.view(dtype)

            return read
        bits = unsigned(held.itemsize)  # a wider register: the instruction takes its lower bits
        narrow = unsigned(dtype.itemsize)
        if held.itemsize < dtype.itemsize:
            raise Fault(f"{self.kernel.name}: a register of {held.itemsize} bytes read as {dtype}")
        return lambda threads: threads.registers[slot].view(bits).astype(narrow).view(dtype)

    def _constant(self, text: str, dtype: np.dtype) -> np.generic:
        bits = unsigned(dtype.itemsize)
        if match := FLOAT_BITS.match(text):
            digits = match.group(2)
            value = np.array([int(digits, 16)], U32 if len(digits) == 8 else U64).view(f"f{len(digits) // 2}")[0]
            value = -value if match.group(1) else value
            return value.astype(dtype) if dtype.kind == "f" else np.array([value]).view(bits)[0]
        if match := INTEGER.match(text):
            value = int(match.group(2), 0 if match.group(2)[:2] in ("0x", "0X") else 10)
            value = -value if match.group(1) else value
            if dtype.kind == "b":
                return np.bool_(value)
            return np.array([value & ((1 << 8 * bits.itemsize) - 1)], bits).view(dtype)[0]
        if text in self.kernel.shared:
            return dtype.type(self.kernel.shared[text])
        if text in self.parameters:
            return dtype.type(self.parameters[text].offset)
        raise Fault(f"{self.kernel.name}: an operand that we do not know: {text}")

    def write(self, text: str) -> Write:
        """A register to write; the value has the register's size. `_` takes nothing."""
        if text == "_":
            return lambda threads, value, mask: None
        slot = self.slots[text]

        def write(threads: Threads, value: np.ndarray, mask: np.ndarray | None) -> None:
            if mask is not None:
                old = threads.registers[slot]
                value = np.where(mask, value, old if old.dtype is value.dtype else old.view(value.dtype))
            threads.registers[slot] = value

        return write

    def write_widened(self, text: str, kind: str) -> Write:
        """A register that may be wider than the value: it is extended, by its sign where the PTX type is signed."""
        write, dtype = self.write(text), NUMPY[kind]
        size = dtype.itemsize if text == "_" else self.types[self.slots[text]].itemsize
        if size == dtype.itemsize:
            return write
        wide = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{size}")
        bits = dtype if dtype.kind in "iu" else unsigned(dtype.itemsize)
        return lambda threads, value, mask: write(threads, value.view(bits).astype(wide), mask)

    def vector(self, text: str) -> list[str]:
        """`{%r1, %r2}` or `%r1` as a list."""
        return [part.strip() for part in text.strip("{} ").split(",")]

    def address(self, text: str) -> tuple[str, int]:
        """`[%rd1+16]`: the base, a register or symbol, and the offset."""
        match = ADDRESS.match(text)
        if match is None:
            raise Fault(f"{self.kernel.name}: an address that we cannot read: {text}")
        return match.group(1), int(match.group(2) or "0", 0)

    def guard(self, instruction: Instruction) -> Read | None:
        """The predicate under which an instruction runs, None where it always does."""
        if instruction.guard is None:
            return None
        return self.read("!" * instruction.guard_negated + instruction.guard, "pred")


def _special(text: str, dtype: np.dtype) -> Read:
    name, _, axis = text[1:].partition(".")
    index = "xyz".index(axis) if axis in ("x", "y", "z") else 0

    def value(threads: Threads) -> np.ndarray:
        if name == "tid":
            return threads.thread if index == 0 else np.zeros(1, U32)
        if name == "laneid":
            return threads.thread % np.uint32(WARP)
        if name == "warpid":
            return threads.thread // np.uint32(WARP)
        if name == "ctaid":
            return threads.block_index[index]
        if name == "ntid":
            return np.array([threads.per_block if index == 0 else 1], U32)
        if name == "nctaid":
            return np.array([threads.grid[index]], U32)
        if name.startswith("cluster_nctaid") or name == "nclusterid":
            return np.ones(1, U32)
        if name.startswith("cluster"):
            return np.zeros(1, U32)
        raise Fault(f"a special register that we do not know: {text}")

    return lambda threads: value(threads).astype(dtype, copy=False)
