"""A model of one streaming multiprocessor: what a path of machine code takes on it, and what limits it.

Nothing here was measured on a GPU; every result is "model". What it knows:

- Each of the four schedulers issues one instruction per clock, from its oldest warp that can issue. A warp can issue when the
  stall count of its last instruction is over and the scoreboards that it waits for are released (control codes of the code).
- A pipe takes an instruction of a warp every so many clocks (`Card`). The load/store unit is shared by the four.
- Logits (16 bytes per thread) come from and go to memory: a server with this processor's share of the copy bandwidth, and a
  latency. Single bfloat16 logits (2 bytes) have that latency too, but are too few to count. What is left, the statistics of a
  row, is in the L2 cache.
- The next program starts `START` clocks after one has left.

It does not know: bank conflicts, instruction cache misses, tails of the grid on other processors, clocks that change.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from machine_code import NO_SCOREBOARD, SINGLE, WIDE, Instruction

SCHEDULERS = 4
WARP = 32
START = 250
"""Clocks from the end of one program to the first instruction of the next; assumed."""
STORE_BUFFER = 24 * 1024
"""Bytes of stores on their way before a warp waits; assumed."""
BARRIER = 18
READ = 18
"""Clocks until the operands of a load or store are read and their registers are free."""
LATENCY = {
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "I2I", "FRND", "POPC", "FLO", "BREV"), 24),
    **dict.fromkeys(("SHFL", "S2R", "S2UR", "REDUX", "CREDUX", "MATCH"), 25),
    **dict.fromkeys(("LDS", "LDSM", "ATOMS", "LDC", "LDCU"), 30),
    **dict.fromkeys(("ATOM", "ATOMG", "MEMBAR", "ERRBAR", "FENCE", "CCTL"), 700),
}
"""Clocks until a scoreboard is released; assumed, of the size that arXiv 1804.06826 and 2402.13499 measured on older cards."""
OTHER_LATENCY = 18


@dataclass(frozen=True)
class Card:
    """A GPU. `clock` in Hz, `copy` in bytes per second (read and write counted), latencies in clocks."""

    name: str
    target: int
    processors: int
    clock: float
    copy: float
    memory_latency: int
    cache_latency: int
    shared: int
    light_unit: bool
    registers: int = 65536
    warps: int = 64
    programs: int = 32

    @property
    def bytes_per_clock(self) -> float:
        """One processor's share of the copy bandwidth."""
        return self.copy / self.processors / self.clock


# Processors, clocks, registers, shared memory: data sheets, and the compute capabilities in the CUDA C++ Programming Guide.
# `copy` is assumed, 85 to 90% of the memory's peak (A100 80 GB 2.04e12, H100 SXM 3.35e12, B200 8.0e12). Latencies are assumed,
# a little above those of idle memories in arXiv 2402.13499; for B200 none are known. A scheduler of an A100 has one unit of 16
# lanes for float32 and integers; those of H100 and B200 have a light one beside it, for float32 alone.
CARDS = {
    card.name: card
    for card in (
        Card("H100", 90, 132, 1.755e9, 3.0e12, 560, 270, 227 * 1024, True),
        Card("A100", 80, 108, 1.410e9, 1.75e12, 470, 270, 163 * 1024, False),
        Card("B200", 100, 148, 1.850e9, 6.8e12, 560, 270, 227 * 1024, True),
    )
}


@dataclass(frozen=True, eq=False)
class Program:
    """The path of each warp of a program (a thread block), and what it occupies: registers per thread, bytes shared."""

    path: list[Instruction]
    warps: int
    registers: int
    shared: int

    @property
    def bytes_moved(self) -> int:
        """Bytes of logits that the whole program loads and stores."""
        wide = (x.width for x in self.path if x.is_global and x.width >= WIDE)
        return sum(wide) * self.warps * WARP

    def resident(self, card: Card) -> int:
        """How many fit on a processor at once; registers are given out to warps, 256 at a time, per scheduler."""
        per_warp = math.ceil(self.registers * WARP / 256) * 256
        by_registers = card.registers // SCHEDULERS // per_warp * SCHEDULERS // self.warps
        by_shared = card.shared // (self.shared + 1024)
        return min(by_registers, by_shared, card.warps // self.warps, card.programs)


@dataclass
class Timeline:
    """What a run gave: the clock at which each program left, its clocks from start to end, and clocks in use by pipe."""

    finished: list[int] = field(default_factory=list)
    lives: list[int] = field(default_factory=list)
    in_use: collections.Counter = field(default_factory=collections.Counter)


@dataclass
class _Warp:
    code: list[tuple]
    block: _Block
    ready: int
    at: int = 0
    waiting: bool = False
    boards: list[int] = field(default_factory=lambda: [0] * 6)


@dataclass
class _Block:
    start: int
    left: int
    warps: list[_Warp] = field(default_factory=list)


def _timing(instruction: Instruction, card: Card) -> tuple:
    """(pipe, clocks of the pipe, clocks of the shared load/store unit, bytes, instruction): what the loop below looks at."""
    pipe = instruction.pipe
    clocks = {"alu": 2, "fma": 2, "heavy": 2, "xu": 8, "uniform": 2, "lsu": 2}.get(pipe, 0)
    moves = instruction.is_global and instruction.width >= WIDE
    shared_clocks = 0.0
    if pipe == "lsu":
        data = instruction.is_global or instruction.name in ("LDS", "STS", "LDSM", "STSM")
        shared_clocks = max(1.0, instruction.width * WARP / 128) if data else 1.0
        if instruction.name in ("REDUX", "CREDUX"):  # half the throughput of a shuffle (CUDA C++ Programming Guide)
            shared_clocks = 2.0
    return pipe, clocks, shared_clocks, instruction.width * WARP if moves else 0, instruction


def run(programs: Iterable[Program], card: Card, resident: int) -> Timeline:
    """Run programs in their order, `resident` of them at once, until the last has left."""
    queue = collections.deque(programs)
    compiled: dict[int, list[tuple]] = {}
    result = Timeline()
    schedulers: list[list[_Warp]] = [[] for _ in range(SCHEDULERS)]
    free = [dict.fromkeys(("alu", "light", "heavy", "xu", "uniform", "lsu", "control"), 0) for _ in range(SCHEDULERS)]
    memory = shared_unit = 0.0
    started = 0

    def admit(now: int) -> None:
        nonlocal started
        program = queue.popleft()
        code = compiled.setdefault(id(program), [_timing(x, card) for x in program.path])
        block = _Block(now, program.warps)
        for index in range(program.warps):
            warp = _Warp(code, block, now)
            block.warps.append(warp)
            schedulers[(started + index) % SCHEDULERS].append(warp)
        started += program.warps

    def release(block: _Block, now: int) -> None:
        """Let the warps go on that wait at a barrier, once all that are left have come."""
        waiting = [warp for warp in block.warps if warp.waiting]
        if waiting and len(waiting) == block.left:
            for warp in waiting:
                warp.waiting, warp.ready = False, max(warp.ready, now + BARRIER)

    for index in range(min(resident, len(queue))):
        admit(index)
    now = 0
    while any(schedulers):
        following = math.inf
        for index, warps in enumerate(schedulers):
            units = free[index]
            for warp in warps:
                if warp.waiting:
                    continue
                if warp.ready > now:
                    following = min(following, warp.ready)
                    continue
                pipe, clocks, shared_clocks, moved, instruction = warp.code[warp.at]
                if pipe == "fma" and card.light_unit and units["light"] <= units["heavy"]:
                    pipe = "light"
                elif pipe == "fma":
                    pipe = "heavy"
                available = units[pipe]
                if pipe == "lsu":
                    available = max(available, shared_unit - 8)
                if available > now:
                    following = min(following, available)
                    continue
                break
            else:
                continue
            following = now + 1
            units[pipe] = now + clocks
            result.in_use["issue"] += 1
            result.in_use[pipe] += clocks
            done = now + LATENCY.get(instruction.name, OTHER_LATENCY)
            read = now + READ
            if pipe == "lsu":
                shared_unit = max(shared_unit, now) + shared_clocks
                result.in_use["load/store"] += shared_clocks
                done = max(done, int(shared_unit) + LATENCY.get(instruction.name, OTHER_LATENCY))
            if moved:
                memory = max(memory, now) + moved / card.bytes_per_clock
                result.in_use["memory"] += moved / card.bytes_per_clock
                if instruction.is_load:
                    done = int(memory) + card.memory_latency
                else:
                    read = max(read, int(memory - STORE_BUFFER / card.bytes_per_clock))
            elif instruction.is_load:
                done = now + (card.memory_latency if instruction.width == SINGLE else card.cache_latency)
            if instruction.result_scoreboard != NO_SCOREBOARD:
                warp.boards[instruction.result_scoreboard] = max(warp.boards[instruction.result_scoreboard], done)
            if instruction.operands_scoreboard != NO_SCOREBOARD:
                warp.boards[instruction.operands_scoreboard] = max(warp.boards[instruction.operands_scoreboard], read)
            warp.ready = now + max(1, instruction.stall)
            warp.at += 1
            block = warp.block
            if warp.at == len(warp.code):
                warps.remove(warp)
                block.warps.remove(warp)
                block.left -= 1
                if block.left == 0:
                    result.finished.append(now)
                    result.lives.append(now - block.start)
                    if queue:
                        admit(now + START)
            else:
                for board in warp.code[warp.at][-1].waits:
                    warp.ready = max(warp.ready, warp.boards[board])
                if instruction.opcode.startswith("BAR.SYNC"):
                    warp.waiting = True
            release(block, now)
        now = int(following) if following > now else now + 1
    result.in_use["clocks"] = now
    return result
