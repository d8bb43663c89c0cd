"""atom and red on global and shared memory, and fences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.dtypes import NUMPY, Fault, type_of, unsigned
from ptx.memory_access import base_and_offset, shared_access, space_of
from ptx.operands import Operands, Run
from ptx.program import Instruction
from ptx.threads import Threads

OPERATIONS: dict[str, Callable] = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "inc": lambda old, x: old.dtype.type(0) if old >= x else old + old.dtype.type(1),
    "dec": lambda old, x: x if old == 0 or old > x else old - old.dtype.type(1),
    "cas": lambda old, compare, x: x if old == compare else old,
}


def build(i: Instruction, operands: Operands, random: np.random.Generator) -> Run:
    """What runs an atomic: one thread after another, in an order that nothing promises."""
    kind, space = type_of(i.modifiers), space_of(i)
    name = next((word for word in i.modifiers if word in OPERATIONS), None)
    if name is None or kind in ("f16", "bf16", "f16x2", "bf16x2"):
        raise Fault("an atomic that the interpreter does not have")
    returns = i.name == "atom"
    write = operands.write(i.operands[0] if returns else "_")
    where, *inputs = i.operands[returns:]
    values = [operands.read(text, kind) for text in inputs]
    address = base_and_offset(operands, where, wide=space == "global")
    dtype, operation = NUMPY[kind], OPERATIONS[name]
    bits = unsigned(dtype.itemsize)
    acquire = bool({"acquire", "acq_rel"} & set(i.modifiers))
    release = bool({"release", "acq_rel"} & set(i.modifiers))

    def run(t: Threads, m: np.ndarray | None) -> None:
        active = random.permutation(t.active(m))
        if not active.size:
            return
        at = t.all_of(address(t))[active]
        given = [t.all_of(value(t))[active] for value in values]
        got = np.zeros(t.count, bits)
        if space == "global":
            for allocation, chosen, offset in t.memory.locate(at, dtype.itemsize):
                _apply(
                    allocation.view(dtype), offset // dtype.itemsize, [x[chosen] for x in given], got, active[chosen]
                )
            for one, block, warp in zip(at.tolist(), t.block[active].tolist(), t.warp[active].tolist(), strict=True):
                t.order.atomic(one, block, release, acquire, warp)
        else:
            place = shared_access(t, at, active, dtype.itemsize, store=False)
            _apply(t.shared.reshape(-1).view(dtype), place // dtype.itemsize, given, got, active)
        write(t, got, m)

    def _apply(elements: np.ndarray, index: np.ndarray, given: list, got: np.ndarray, active: np.ndarray) -> None:
        for n, thread in enumerate(active):
            old = elements[index[n]]
            got[thread] = old.view(bits)
            elements[index[n]] = operation(old, *(x[n] for x in given))

    return run


def build_fence(i: Instruction, operands: Operands) -> Run:
    """membar and fence. At the scope of a block nothing is needed beyond the barriers that `ordering` asks for."""
    if "cta" in i.modifiers:
        return lambda t, m: None

    def run(t: Threads, m: np.ndarray | None) -> None:
        active = t.active(m)
        t.order.fence(t.block[active], t.warp[active])

    return run
