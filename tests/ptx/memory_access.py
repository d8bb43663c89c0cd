"""ld, st, ldmatrix and stmatrix: every access is checked for its alignment, its bounds and its order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.dtypes import NUMPY, S64, U16, U32, U64, WARP, Fault, type_of, unsigned
from ptx.operands import Operands, Run
from ptx.program import Instruction
from ptx.threads import Threads

VECTORS = {"v2": 2, "v4": 4, "v8": 8}
STRONG = {"acquire", "release", "relaxed", "volatile"}
_TWO_VALUES = "two threads of one instruction write different values to one place"


def space_of(i: Instruction) -> str:
    """The state space; generic addresses are global ones here, since no kernel of ours takes the address of another."""
    return next((word for word in i.modifiers if word in ("global", "shared", "param", "local", "const")), "global")


def base_and_offset(operands: Operands, text: str, wide: bool) -> Callable[[Threads], np.ndarray]:
    """Reads an address operand: 64 bits where `wide`, else as signed 64-bit offsets into the block's shared memory."""
    base, offset = operands.address(text)
    held = operands.types[operands.slots[base]].itemsize if base in operands.slots else 8
    read = operands.read(base, f"u{8 * held}")
    if wide:
        shift = np.uint64(offset & 0xFFFFFFFFFFFFFFFF)
        return lambda t: read(t).astype(U64, copy=False) + shift
    return lambda t: read(t).astype(S64) + offset


def build(i: Instruction, operands: Operands) -> Run:
    """What runs a load or a store."""
    space, kind = space_of(i), type_of(i.modifiers)
    width = next((VECTORS[word] for word in i.modifiers if word in VECTORS), 1)
    store = i.name == "st"
    where, what = (i.operands[0], i.operands[1]) if store else (i.operands[1], i.operands[0])
    names = operands.vector(what)
    if len(names) != width or space in ("local", "const"):
        raise Fault("an access that the interpreter does not have")
    if space == "param":
        return _load_parameter(operands, where, names, kind)
    dtype = unsigned(NUMPY[kind].itemsize)
    if store:
        values = [operands.read(name, f"b{8 * dtype.itemsize}") for name in names]
    else:
        writes = [operands.write_widened(name, kind) for name in names]
    address = base_and_offset(operands, where, wide=space == "global")
    find = _global_elements if space == "global" else _shared_elements
    strong = bool(STRONG & set(i.modifiers))
    acquire, release = ("acquire" in i.modifiers, "release" in i.modifiers)

    def run(t: Threads, m: np.ndarray | None) -> None:
        active = t.active(m)
        if not active.size:
            return
        at = address(t)
        at = at[active] if at.shape[0] == t.count else np.broadcast_to(at, active.shape)
        parts = find(t, at, active, dtype.itemsize * width, store, strong)
        if strong and space == "global":
            _publish(t, at, active, release, acquire)
        if store:
            for view, chosen, index in parts:
                _put(t, view, index, dtype, [value(t) for value in values], active[chosen])
        else:
            for n, write in enumerate(writes):
                write(t, _gather(t, parts, dtype, n, active, m), m)

    return run


def _gather(t: Threads, parts: list, dtype: np.dtype, n: int, active: np.ndarray, m: np.ndarray | None) -> np.ndarray:
    """Element n of every active thread's vector, in an array for all threads."""
    view, chosen, index = parts[0]
    if len(parts) == 1:
        got = view(dtype)[index // dtype.itemsize + n]
    else:
        got = np.empty(active.size, dtype)
        for view, chosen, index in parts:
            got[chosen] = view(dtype)[index // dtype.itemsize + n]
    if m is None:
        return got
    whole = np.zeros(t.count, dtype)
    whole[active] = got
    return whole


def _put(t: Threads, view: Callable, index: np.ndarray, dtype: np.dtype, values: list, active: np.ndarray) -> None:
    elements, first = view(dtype), index // dtype.itemsize
    for n, value in enumerate(values):
        value = value[active] if value.shape[0] == t.count else np.broadcast_to(value, active.shape)
        elements[first + n] = value
        if (elements[first + n] != value).any():
            raise Fault(_TWO_VALUES)


def _global_elements(t: Threads, at: np.ndarray, active: np.ndarray, size: int, store: bool, strong: bool) -> list:
    found = t.memory.locate(at, size)
    if not strong:
        for allocation, chosen, offset in found:
            granule = allocation.granule
            count, places = max(1, size // granule), offset // granule
            block, warp = t.block[active[chosen]], t.warp[active[chosen]]
            if count > 1:
                places = (places[:, None] + np.arange(count)).ravel()
                block, warp = np.repeat(block, count), np.repeat(warp, count)
            t.order.access(allocation.address, places, allocation.places, block, warp, store)
    return [(allocation.view, chosen, offset) for allocation, chosen, offset in found]


def _publish(t: Threads, at: np.ndarray, active: np.ndarray, release: bool, acquire: bool) -> None:
    for address, block, warp in set(zip(at.tolist(), t.block[active].tolist(), t.warp[active].tolist(), strict=True)):
        t.order.atomic(address, block, release, acquire, warp)


def shared_access(
    t: Threads, at: np.ndarray, active: np.ndarray, size: int, store: bool, align: int | None = None
) -> np.ndarray:
    """Check accesses to shared memory and give their offsets in all blocks' memory together."""
    wrong = at % (align or size)
    if wrong.any():
        first = int(at[np.flatnonzero(wrong)[0]])
        raise Fault(f"a misaligned access: {align or size} bytes at offset {first} of shared memory")
    if int(at.min()) < 0 or int(at.max()) + size > t.shared_bytes:
        raise Fault(f"an access outside the block's {t.shared_bytes} bytes of shared memory: offset {int(at.max())}")
    slot = t.slot[active]
    since = t.order.barrier[t.block[active]]
    t.shared_order.access(slot, at, size, t.warp[active], since, t.order.tick(), store)
    return slot * t.shared.shape[1] + at


def _shared_elements(t: Threads, at: np.ndarray, active: np.ndarray, size: int, store: bool, strong: bool) -> list:
    flat = t.shared.reshape(-1)
    return [(flat.view, slice(None), shared_access(t, at, active, size, store))]


def _load_parameter(operands: Operands, where: str, names: list[str], kind: str) -> Run:
    address = base_and_offset(operands, where, wide=False)
    dtype = NUMPY[kind]
    writes = [operands.write_widened(name, kind) for name in names]

    def run(t: Threads, m: np.ndarray | None) -> None:
        at = address(t)
        if at.shape[0] > 1:
            at = np.unique(at[t.active(m)])
        start, size = int(at[0]), dtype.itemsize
        if at.size != 1 or start < 0 or start + size * len(names) > t.parameters.size:
            raise Fault("an access outside the kernel's parameters, or to several at once")
        for n, write in enumerate(writes):
            write(t, t.parameters[start + n * size : start + (n + 1) * size].view(dtype), m)

    return run


def build_matrix(i: Instruction, operands: Operands) -> Run:
    """ldmatrix and stmatrix of 8 x 8 matrices of 16-bit elements, not transposed.

    Thread 8 n + r of a warp gives the address of row r of matrix n; thread t holds elements 2 (t % 4) and the next one of
    row t / 4.
    """
    count = next((int(word[1]) for word in i.modifiers if word in ("x1", "x2", "x4")), 1)
    store = i.name == "stmatrix"
    where, what = (i.operands[0], i.operands[1]) if store else (i.operands[1], i.operands[0])
    if "trans" in i.modifiers or "m8n8" not in i.modifiers or "b16" not in i.modifiers:
        raise Fault("this form of a matrix access is not in the interpreter")
    address = base_and_offset(operands, where, wide=False)
    registers = operands.vector(what)
    values = [operands.read(name, "b32") for name in registers] if store else []
    writes = [] if store else [operands.write(name) for name in registers]

    def run(t: Threads, m: np.ndarray | None) -> None:
        active = t.active(m)
        if m is not None and (m.reshape(-1, WARP).any(1) != m.reshape(-1, WARP).all(1)).any():
            raise Fault("a matrix access by a part of a warp")
        at = t.all_of(address(t))
        for n in range(count):
            rows = (active - active % WARP) + 8 * n + active % WARP // 4
            if (at[rows] % 16).any():
                raise Fault("a misaligned access: a matrix's row that does not begin at a multiple of 16 bytes")
            place = shared_access(t, at[rows] + active % 4 * 4, active, 4, store)
            halves = t.shared.reshape(-1).view(U16)
            if store:
                value = t.all_of(values[n](t))[active]
                halves[place // 2], halves[place // 2 + 1] = value & U32.type(0xFFFF), value >> U32.type(16)
            else:
                whole = np.zeros(t.count, U32)
                whole[active] = halves[place // 2].astype(U32) | halves[place // 2 + 1].astype(U32) << U32.type(16)
                writes[n](t, whole, m)

    return run
