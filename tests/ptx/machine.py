"""A kernel that is ready to run: its instructions are prepared once, and its launches run many blocks at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ptx import atomics, conversions, floats, integers, memory_access, warps
from ptx.approximations import Perturbation
from ptx.contraction import contracted, count_registers
from ptx.dtypes import FLOATS, NUMPY, WARP, Fault, type_of
from ptx.memory import Memory
from ptx.operands import Operands, Read, Run
from ptx.ordering import GlobalOrder
from ptx.program import Instruction, Kernel, parse
from ptx.schedule import Block, Schedule
from ptx.threads import Threads

CONTROL = ("bra", "ret", "exit", "bar", "barrier")
NOTHING = ("griddepcontrol", "prefetch", "prefetchu", "nanosleep", "pragma")
FLOAT_NAMES = {*floats.BINARY, *floats.UNARY, *floats.APPROXIMATE, "fma", "mad", "div", "copysign"}
AT_ONCE = 16384  # threads; more do not fit in the cache, fewer pay more for each instruction
ORDERS: dict[str, Callable[[int], np.ndarray]] = {
    "forward": np.arange,
    "reverse": lambda count: np.arange(count)[::-1],
    "shuffled": lambda count: np.random.default_rng(count).permutation(count),
}
"""The blocks of a launch in the order in which they run, from their number."""


@dataclass
class Launched:
    """What a launch cost, in seconds of the processor."""

    thread_instructions: int
    seconds: float


class Machine:
    """A kernel that is ready to run."""

    def __init__(
        self,
        ptx: str | Kernel,
        name: str | None = None,
        contract: bool = False,
        perturb: float = 0.0,
        seed: int = 0,
        shared_bytes: int = 0,
    ) -> None:
        """Prepare a kernel.

        Args:
            ptx: a module's text, or a parsed kernel.
            name: which entry, the first if left out.
            contract: do as ptxas with its default --fmad=true.
            perturb: the error of approximate instructions, as a part of what the manual allows.
            seed: of that error, and of the order of atomics.
            shared_bytes: dynamic shared memory of the launch.

        Raises:
            Fault: PTX that the interpreter does not have.
        """
        self.kernel = ptx if isinstance(ptx, Kernel) else parse(ptx, name)
        self.shared_bytes = max(self.kernel.shared_bytes, shared_bytes)
        self._operands = Operands(self.kernel)
        self._perturb, self._random = Perturbation(perturb, seed), np.random.default_rng(seed)
        self._blocks = self._prepare(contract)
        accesses = [i for i in self.kernel.instructions if "shared" in i.modifiers and type_of(i.modifiers)]
        self._granule = min((NUMPY[type_of(i.modifiers)].itemsize for i in accesses), default=4)

    def launch(
        self,
        grid: Sequence[int],
        parameters: Sequence[bytes],
        memory: Memory,
        threads: int | None = None,
        order: np.ndarray | None = None,
        at_once: int | None = None,
    ) -> Launched:
        """Run a grid.

        Args:
            grid: blocks in x, y and z.
            parameters: the bytes of each parameter.
            memory: what the kernel may touch.
            threads: of a block; the kernel's own number if left out.
            order: the linear indices of the blocks in the order in which they run.
            at_once: how many blocks run together; as many as fit if left out.

        Raises:
            Fault: the kernel did what a GPU refuses or what has no defined result.
        """
        threads = threads or self.kernel.threads
        if threads is None or threads % WARP:
            raise Fault(f"{self.kernel.name}: a block of {threads} threads")
        grid = (*grid, 1, 1)[:3]
        blocks = np.arange(int(np.prod(grid))) if order is None else np.asarray(order)
        ordering = GlobalOrder(len(blocks), threads // WARP)
        at_once = at_once or max(1, AT_ONCE // threads)
        start, executed = time.process_time(), 0
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), at_once):
                running = Threads(
                    blocks[first : first + at_once], threads, grid, self._operands.initial(), self._pack(parameters), memory,
                    self.shared_bytes, self._granule, ordering,
                )  # fmt: skip
                executed += Schedule(self.kernel.name, self._blocks, running).to_the_end()
        return Launched(executed, time.process_time() - start)

    def _pack(self, parameters: Sequence[bytes]) -> np.ndarray:
        declared = self.kernel.parameters
        if [len(value) for value in parameters] != [parameter.size for parameter in declared]:
            raise Fault(f"{self.kernel.name}: arguments of {[len(v) for v in parameters]} bytes for {declared}")
        whole = np.zeros(max((p.offset + p.size for p in declared), default=0), np.uint8)
        for parameter, value in zip(declared, parameters, strict=True):
            whole[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(value, np.uint8)
        return whole

    def _prepare(self, contract: bool) -> list[Block]:
        instructions, labels = self.kernel.instructions, set(self.kernel.labels.values())
        reads, writes = count_registers(instructions)
        blocks, starts, body = [], {}, []
        for n, i in enumerate(instructions):
            if n in labels and (body or n == 0):
                self._close(blocks, body, None, contract and (reads, writes)) if body else None
                body = []
            if n in labels:
                starts[n] = len(blocks)
            if i.name in CONTROL:
                self._close(blocks, body, i, contract and (reads, writes))
                body = []
            else:
                body.append(i)
        self._close(blocks, body, None, contract and (reads, writes))
        for block in blocks:
            if block.end is not None and block.end.name == "bra":
                block.target = starts.get(self.kernel.labels[block.end.operands[0]], len(blocks))
        return blocks

    def _close(self, blocks: list[Block], body: list[Instruction], end: Instruction | None, counts) -> None:
        if counts:
            body = contracted(body, *counts)
        block = Block([self._step(i) for i in body], body, end, self._operands.guard(end) if end else None)
        if end is not None and end.name in ("bar", "barrier") and end.operands != ("0",):
            raise Fault(f"{self.kernel.name}: {end.text}: only barrier 0 of the whole block is in the interpreter")
        blocks.append(block)

    def _step(self, i: Instruction) -> Run:
        try:
            run = self._build(i)
        except (Fault, KeyError, StopIteration, ValueError) as error:
            raise Fault(f"{self.kernel.name}: {i.text}: not in the interpreter: {error!r}") from error
        guard = self._operands.guard(i)
        return run if guard is None else _guarded(run, guard)

    def _build(self, i: Instruction) -> Run:
        operands = self._operands
        if i.name in NOTHING:
            return lambda t, m: None
        if i.name in ("ld", "st"):
            return memory_access.build(i, operands)
        if i.name in ("ldmatrix", "stmatrix"):
            return memory_access.build_matrix(i, operands)
        if i.name in ("atom", "red"):
            return atomics.build(i, operands, self._random)
        if i.name in ("membar", "fence"):
            return atomics.build_fence(i, operands)
        if i.name in ("shfl", "vote", "redux", "activemask", "match"):
            return warps.build(i, operands)
        if i.name == "cvt":
            return conversions.build(i, operands)
        if i.name in FLOAT_NAMES and type_of(i.modifiers) in FLOATS:
            return floats.build(i, operands, self._perturb)
        return integers.build(i, operands)


def _guarded(run: Run, guard: Read) -> Run:
    def step(t: Threads, m: np.ndarray | None) -> None:
        chosen = guard(t)
        if chosen.shape[0] == 1:
            if chosen[0]:
                run(t, m)
            return
        chosen = chosen if m is None else chosen & m
        count = np.count_nonzero(chosen)
        if count:
            run(t, None if count == t.count else chosen)

    return step
