"""Which threads run what next.

Threads that have branched apart run one group after the other, the one that is furthest behind first, so that groups meet where
their paths join. Barriers hold the threads of a block until all have arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptx.dtypes import WARP, Fault
from ptx.operands import Read, Run
from ptx.program import Instruction
from ptx.threads import Threads

ENDLESS = 2_000_000  # basic blocks that one run may take


@dataclass
class Block:
    """Instructions that run one after the other, and what ends them."""

    steps: list[Run] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None
    guard: Read | None = None
    target: int = 0


class Schedule:
    """Blocks of threads on their way: groups that are ready, and threads that wait at a barrier."""

    def __init__(self, kernel: str, blocks: list[Block], threads: Threads) -> None:
        self.kernel, self.blocks, self.t = kernel, blocks, threads
        self.ready: dict[int, np.ndarray | None] = {0: None}  # place to the threads that go on there; None is all
        self.resume = np.full(threads.count, -1)  # where a thread goes on after the barrier at which it waits

    def to_the_end(self) -> int:
        """Run until all threads have ended; gives the number of thread instructions."""
        t, executed, rounds = self.t, 0, 0
        while self.ready:
            at = min(self.ready)
            m = self.ready.pop(at)
            if at == len(self.blocks):
                self.leave(m, at)
                continue
            block, done = self.blocks[at], 0
            try:
                for step in block.steps:
                    step(t, m)
                    done += 1
                self.leave(m, at)
            except Fault as fault:
                text = block.instructions[done].text if done < len(block.steps) else block.end.text
                raise Fault(f"{self.kernel}: {text}: {fault}") from fault
            active = t.count if m is None else int(np.count_nonzero(m))
            executed += (len(block.steps) + (block.end is not None)) * active
            rounds += 1
            if rounds > ENDLESS:
                raise Fault(f"{self.kernel}: it does not end")
        if (self.resume >= 0).any():
            raise Fault(f"{self.kernel}: threads wait for ever at a barrier")
        return executed

    def leave(self, m: np.ndarray | None, at: int) -> None:
        """Where the threads of a group go when its block ends."""
        end = self.blocks[at].end if at < len(self.blocks) else None
        name = end.name if end is not None else "bra" if at < len(self.blocks) else "ret"
        if end is None:
            return self.end(m) if name == "ret" else self.go(at + 1, m)
        guard = self.blocks[at].guard
        taken = m
        if guard is not None:
            taken, others = self.split(m, guard(self.t))
            if others is not False:
                self.go(at + 1, others)
            if taken is False:
                return None
        if name == "bra":
            return self.go(self.blocks[at].target, taken)
        if name in ("ret", "exit"):
            return self.end(taken)
        return self.wait(taken, at + 1)

    def split(self, m: np.ndarray | None, chosen: np.ndarray) -> tuple:
        """(threads that take a branch, those that do not); False is none, None is all."""
        if chosen.shape[0] == 1:
            return (m, False) if chosen[0] else (False, m)
        whole = self.t.count if m is None else np.count_nonzero(m)
        taken = chosen if m is None else chosen & m
        count = np.count_nonzero(taken)
        if count in (0, whole):
            return (m, False) if count else (False, m)
        return taken, ~taken if m is None else m & ~taken

    def go(self, at: int, m: np.ndarray | None) -> None:
        if at in self.ready:
            m = m | self.ready[at]
            if m.all():
                m = None
        self.ready[at] = m

    def end(self, m: np.ndarray | None) -> None:
        self.t.alive[slice(None) if m is None else m] = False
        if m is not None:
            self.release()

    def wait(self, m: np.ndarray | None, then: int) -> None:
        t = self.t
        if m is None:
            t.order.barrier[t.blocks] = t.order.tick()
            return self.go(then, None)
        by_warp = m.reshape(-1, WARP)
        apart = by_warp.any(1) & ~(by_warp | ~t.alive.reshape(-1, WARP)).all(1)
        if apart.any():
            raise Fault("a barrier that a part of a warp reaches")
        self.resume[m] = then
        return self.release()

    def release(self) -> None:
        """Let the blocks go on whose threads have all arrived."""
        t = self.t
        resume, alive = self.resume.reshape(len(t.blocks), -1), t.alive.reshape(len(t.blocks), -1)
        arrived = resume >= 0
        complete = arrived.any(1) & (arrived | ~alive).all(1)
        if not complete.any():
            return
        if not alive[complete].all():
            raise Fault("a barrier that not all threads of the block reach: some have ended")
        if (resume[complete].min(1) != resume[complete].max(1)).any():
            raise Fault("threads of one block wait at different barriers")
        t.order.barrier[t.blocks[complete]] = t.order.tick()
        for then in np.unique(resume[complete]):
            m = np.repeat(complete, t.per_block) & (self.resume == then)
            self.resume[m] = -1
            self.go(int(then), m)
