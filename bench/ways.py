"""The way that a peaked row takes through the machine code of a kernel, found by a rule and not by hand."""

from __future__ import annotations

import heapq
import math

from machine_code import SINGLE, WIDE, Instruction


def successors(code: list[Instruction], index: int) -> list[int]:
    """Where a thread may be after the instruction at `index`; len(code) stands for its end."""
    instruction = code[index]
    if instruction.name == "EXIT":
        return [len(code), index + 1] if instruction.is_conditional else [len(code)]
    if instruction.opcode.startswith("BRA.DIV"):  # taken where the threads of a warp have come apart: never
        return [index + 1]
    if instruction.name in ("BRA", "CALL") and instruction.target is not None:  # a call inside a kernel is a far branch
        return [instruction.target, index + 1] if instruction.is_conditional else [instruction.target]
    if instruction.name in ("RET", "CALL", "BRX", "KILL", "BPT"):
        return []  # the slow way of a division, an indirect jump, a trap: no path of ours goes there
    return [index + 1]


def blocks(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, end) of the basic blocks, in the order of the code."""
    leaders = {0}
    for index, instruction in enumerate(code):
        if instruction.name in ("BRA", "EXIT", "RET", "CALL", "BRX"):
            leaders |= {index + 1} | ({instruction.target} if instruction.target is not None else set())
    starts = sorted(leader for leader in leaders if leader < len(code))
    return list(zip(starts, [*starts[1:], len(code)], strict=True))


def counted_loops(code: list[Instruction]) -> dict[int, int]:
    """{index of the branch that closes a loop: how often its body runs}, of the loops with a number of rounds in the code.

    Such a branch tests whether a register differs from an immediate bound (or has not reached it); the register grows by an
    immediate step in the body, from zero, as the counters of Triton's `for i in range(N)` do.
    """
    found = {}
    for index, branch in enumerate(code):
        if branch.name != "BRA" or branch.target is None or branch.target >= index or not branch.is_conditional:
            continue
        predicate = (branch.guard or branch.operands[0]).lstrip("!")
        body = list(enumerate(code[branch.target : index]))
        tests = [
            (at, x)
            for at, x in body
            if x.name in ("ISETP", "UISETP") and predicate in x.operands[:2] and ".EX" not in x.opcode
        ]
        if not tests or not tests[-1][1].operands[3].startswith("0x") or ".GT" in tests[-1][1].opcode:
            continue
        tested, test = tests[-1]
        counter, bound = test.operands[2].removesuffix(".reuse"), int(test.operands[3], 16)
        grows = (
            (at, x) for at, x in body if x.name in ("IADD3", "VIADD", "IADD", "UIADD3") and x.operands[0] == counter
        )
        steps = [(at, int(y, 16)) for at, x in grows for y in x.operands[1:] if y.startswith("0x")]
        if steps and bound % steps[-1][1] == 0:
            found[index] = bound // steps[-1][1] + (steps[-1][0] > tested)
    return found


def path(
    code: list[Instruction],
    exactly: tuple[int, int],
    exponentials: int = 0,
    singles: int = 0,
    straight: bool = False,
) -> list[Instruction]:
    """The shortest way from the entry to an exit on which a thread moves what the row makes it move.

    `exactly`: bytes of logits that it loads and stores (16 or more at a time); `exponentials` and `singles`: how many
    exponentials it takes and how many logits it loads one by one, at least. That is the way of a peaked row: it skips what only
    kept tokens or infinities need. Counted loops run as often as they count, others as often as there is something to move;
    with `straight` those others once. "Shortest" counts instructions. ValueError where no way does the work.
    """
    ranges = dict(blocks(code))
    work = {first: _work(code[first:end]) for first, end in ranges.items()}
    lengths = {first: sum(x.name != "NOP" for x in code[first:end]) for first, end in ranges.items()}
    counted = counted_loops(code)
    loops = list(counted.items())
    least = (exponentials, singles)
    start = (0, (0, 0), (0, 0), (0,) * len(loops))
    best = {start: 0}
    came_from: dict[tuple, tuple] = {}
    queue = [(0, start)]
    while queue:
        cost, state = heapq.heappop(queue)
        first, moved, done, rounds = state
        if cost > best[state]:
            continue
        if first == len(code):
            if (moved, done) == (exactly, least):
                return _walk(code, ranges, came_from, state)
            continue
        loads, stores, *taken = work[first]
        moved = (moved[0] + loads, moved[1] + stores)
        done = tuple(min(so_far + more, enough) for so_far, more, enough in zip(done, taken, least, strict=True))
        if moved[0] > exactly[0] or moved[1] > exactly[1]:
            continue
        last = ranges[first] - 1
        for following in successors(code, last):
            if straight and following <= last and last not in counted:
                continue
            after_rounds = _next_rounds(code, loops, rounds, last, following)
            after = (following, moved, done, after_rounds)
            if after_rounds is not None and cost + lengths[first] < best.get(after, math.inf):
                best[after] = cost + lengths[first]
                came_from[after] = state
                heapq.heappush(queue, (best[after], after))
    reached = sorted({state[1:3] for state in best if state[0] == len(code)})[-5:]
    raise ValueError(
        f"no way loads and stores {exactly} bytes of a thread, 16 at a time, with at least {exponentials} exponentials and "
        f"{singles} single logits; the nearest do {reached}"
    )


def _next_rounds(code: list, loops: list, rounds: tuple[int, ...], last: int, following: int) -> tuple[int, ...] | None:
    """The rounds of the counted loops after a step; None where it leaves a loop too early or goes round it once too often."""
    for number, (branch, count) in enumerate(loops):
        if last == branch:
            goes_round = following == code[branch].target
            if goes_round != (rounds[number] + 1 < count):
                return None
            return (*rounds[:number], rounds[number] + 1 if goes_round else 0, *rounds[number + 1 :])
    return rounds


def _work(code: list[Instruction]) -> tuple[int, int, int, int]:
    """(bytes of logits loaded, stored, exponentials, single logits loaded) of a thread."""
    moves = [x for x in code if x.is_global]
    return (
        sum(x.width for x in moves if x.is_load and x.width >= WIDE),
        sum(x.width for x in moves if not x.is_load and x.width >= WIDE),
        sum(x.opcode.startswith("MUFU.EX2") for x in code),
        sum(x.is_load and x.width == SINGLE for x in moves),
    )


def _walk(code: list[Instruction], ranges: dict[int, int], came_from: dict, state: tuple) -> list[Instruction]:
    visited = []
    while state in came_from:
        state = came_from[state]
        visited.append(state[0])
    return [x for first in reversed(visited) for x in code[first : ranges[first]] if x.name != "NOP"]


def first_wide_load(way: list[Instruction]) -> int | None:
    """Instructions before the first load of logits; None where none are loaded."""
    return next((index for index, x in enumerate(way) if x.is_load and x.width >= WIDE), None)


def loads_before_first_wait(way: list[Instruction]) -> bool:
    """Whether all loads of logits are issued before an instruction waits for one of them."""
    wide = [index for index, x in enumerate(way) if x.is_load and x.width >= WIDE]
    pending: set[int] = set()
    for index, instruction in enumerate(way):
        if pending & set(instruction.waits):
            return index > wide[-1]
        if index in wide:
            pending.add(instruction.result_scoreboard)
    return True
