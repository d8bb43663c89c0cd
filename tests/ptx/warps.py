"""Instructions by which the threads of a warp exchange values: shfl, vote, redux, match, activemask and bar.warp.sync."""

from __future__ import annotations

import numpy as np

from ptx.dtypes import NUMPY, S64, U32, U64, WARP, Fault, type_of
from ptx.operands import Operands, Run
from ptx.program import Instruction
from ptx.threads import Threads

BITS = np.uint64(1) << np.arange(WARP, dtype=U64)
_EIGHT = np.uint64(0x0101010101010101)
REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def build(i: Instruction, operands: Operands) -> Run:
    """What runs an instruction of a warp."""
    return {"shfl": _shuffle, "vote": _vote, "redux": _reduce, "activemask": _active_mask, "match": _match}[i.name](
        i, operands
    )


def _whole_warps(m: np.ndarray) -> bool:
    """Whether every warp runs as a whole or not at all; eight threads at a time."""
    eights = m.view(U64).reshape(-1, WARP // 8)
    same = (eights == eights[:, :1]).all()
    return bool(same and ((eights == 0) | (eights == _EIGHT)).all())


def check_members(t: Threads, m: np.ndarray | None, members: np.ndarray) -> None:
    """A thread must be in its own mask, and every living thread of the mask must be here.

    Raises:
        Fault: otherwise; on a GPU the result is undefined or the warp waits for ever.
    """
    whole = m is None or _whole_warps(m)
    if whole and (members == 0xFFFFFFFF if m is None else t.all_of(members)[m] == 0xFFFFFFFF).all():
        return
    named = (t.all_of(members).astype(U64)[:, None] & BITS) != 0  # by thread, the lanes that it names
    here = (np.ones(t.count, bool) if m is None else m).reshape(-1, WARP)
    active = here.ravel()
    if not named[t.lanes, t.lane_in_warp][active].all():
        raise Fault("a thread that is not in its own member mask")
    missing = named[active] & ~here[t.lanes[active] // WARP]
    if missing.any():
        raise Fault("a member mask names threads that do not run this instruction")


def _shuffle(i: Instruction, operands: Operands) -> Run:
    mode = next(word for word in i.modifiers if word in ("bfly", "up", "down", "idx"))
    target, _, found = i.operands[0].partition("|")
    write, write_found = operands.write(target.strip()), operands.write(found.strip()) if found else None
    value = operands.read(i.operands[1], "b32")
    by, clamp = (operands.read(text, "s32") for text in i.operands[2:4])
    members = operands.read(i.operands[4], "b32")
    remembered: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def sources(t: Threads) -> tuple[np.ndarray, np.ndarray]:
        b, c = by(t), clamp(t)
        key = (t.count, int(b[0]), int(c[0])) if b.shape[0] == c.shape[0] == 1 else None
        if key not in remembered or key is None:
            remembered[key] = _sources(mode, t.lane_in_warp, b.astype(S64), c.astype(S64))
        return remembered[key]

    def run(t: Threads, m: np.ndarray | None) -> None:
        lane, inside = sources(t)
        check_members(t, m, members(t))
        source = t.lanes - t.lane_in_warp + lane
        if m is not None and not m[source][m].all():
            raise Fault("shfl reads from a thread that does not run it")
        write(t, t.all_of(value(t))[source], m)
        if write_found is not None:
            write_found(t, t.all_of(inside), m)

    return run


def _sources(mode: str, lane: np.ndarray, by: np.ndarray, clamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lane that each thread reads from, whether it is in range); out of range a thread reads from itself."""
    segment, last = clamp >> 8 & 31, clamp & 31
    lowest = lane & segment
    highest = lowest | last & ~segment
    by = by & 31
    wanted = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": lowest | by & ~segment}[mode]
    inside = wanted >= highest if mode == "up" else wanted <= highest
    return np.where(inside, wanted, lane), inside


def _vote(i: Instruction, operands: Operands) -> Run:
    mode = next(word for word in i.modifiers if word in ("all", "any", "uni", "ballot"))
    write, value = operands.write(i.operands[0]), operands.read(i.operands[1], "pred")
    members = operands.read(i.operands[2], "b32")

    def run(t: Threads, m: np.ndarray | None) -> None:
        check_members(t, m, members(t))
        here = np.ones((t.count // WARP, WARP), bool) if m is None else m.reshape(-1, WARP)
        true = t.all_of(value(t)).reshape(-1, WARP) & here
        if mode == "ballot":
            result = (true * BITS).sum(1).astype(U32)
        else:
            every, some = (true | ~here).all(1), true.any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(t, np.repeat(result, WARP), m)

    return run


def _reduce(i: Instruction, operands: Operands) -> Run:
    kind, name = type_of(i.modifiers), next(word for word in i.modifiers if word in REDUCE)
    write, value, members = (
        operands.write(i.operands[0]), operands.read(i.operands[1], kind), operands.read(i.operands[2], "b32"),
    )  # fmt: skip
    combine, dtype = REDUCE[name], NUMPY[kind]
    absolute = "abs" in i.modifiers
    if dtype.kind == "f" and "NaN" not in i.modifiers:
        combine = {"min": np.fmin, "max": np.fmax}[name]

    def run(t: Threads, m: np.ndarray | None) -> None:
        mask = members(t)
        check_members(t, m, mask)
        if (t.all_of(mask)[t.active(m)] != 0xFFFFFFFF).any():
            raise Fault("redux by a part of a warp is not in the interpreter")
        x = t.all_of(value(t)).reshape(-1, WARP)
        result = combine.reduce(np.abs(x) if absolute else x, axis=1).astype(dtype)
        write(t, np.repeat(result, WARP), m)

    return run


def _active_mask(i: Instruction, operands: Operands) -> Run:
    write = operands.write(i.operands[0])

    def run(t: Threads, m: np.ndarray | None) -> None:
        here = np.ones((t.count // WARP, WARP), bool) if m is None else m.reshape(-1, WARP)
        write(t, np.repeat((here * BITS).sum(1).astype(U32), WARP), m)

    return run


def _match(i: Instruction, operands: Operands) -> Run:
    if "any" not in i.modifiers:
        raise Fault("match.all is not in the interpreter")
    kind = type_of(i.modifiers)
    write, value = operands.write(i.operands[0]), operands.read(i.operands[1], kind)
    members = operands.read(i.operands[2], "b32")

    def run(t: Threads, m: np.ndarray | None) -> None:
        check_members(t, m, members(t))
        here = np.ones((t.count // WARP, WARP), bool) if m is None else m.reshape(-1, WARP)
        x = t.all_of(value(t)).reshape(-1, WARP)
        same = (x[:, :, None] == x[:, None, :]) & here[:, None, :]
        write(t, (same * BITS).sum(2).astype(U32).ravel(), m)

    return run
