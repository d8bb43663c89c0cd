"""The threads of the blocks that run at the same time: their registers, their shared memory, who has ended and who waits."""

from __future__ import annotations

import functools

import numpy as np

from ptx.dtypes import S64, U32, WARP
from ptx.memory import Memory
from ptx.ordering import GlobalOrder, SharedOrder


class Threads:
    """One element of every array for each thread, block after block."""

    def __init__(
        self,
        blocks: np.ndarray,
        per_block: int,
        grid: tuple[int, int, int],
        registers: list[np.ndarray],
        parameters: np.ndarray,
        memory: Memory,
        shared_bytes: int,
        shared_granule: int,
        order: GlobalOrder,
    ) -> None:
        """blocks: the linear indices in the grid of the blocks that run together."""
        self.blocks, self.per_block, self.grid = blocks, per_block, grid
        self.count = len(blocks) * per_block
        self.registers, self.parameters, self.memory = registers, parameters, memory
        self.thread = np.tile(np.arange(per_block, dtype=U32), len(blocks))
        self.slot = np.repeat(np.arange(len(blocks), dtype=S64), per_block)  # the block's place in `blocks`
        self.warp = (self.thread // U32.type(WARP)).astype(S64)
        index = np.repeat(blocks, per_block)
        self.block = index.astype(S64)
        x, y, _ = grid
        self.block_index = tuple(i.astype(U32) for i in (index % x, index // x % y, index // (x * y)))
        self.lanes = np.arange(self.count)
        self.shared = np.zeros((len(blocks), -(-max(shared_bytes, 1) // 16) * 16), np.uint8)
        self.shared_bytes = shared_bytes
        self.order = order
        self.shared_order = SharedOrder(self.shared.shape, shared_granule, len(blocks))
        self.alive = np.ones(self.count, bool)

    def active(self, mask: np.ndarray | None) -> np.ndarray:
        """The indices of the threads of a mask; None is all."""
        return self.lanes if mask is None else np.flatnonzero(mask)

    def all_of(self, value: np.ndarray) -> np.ndarray:
        """One element for each thread."""
        return value if value.shape[0] == self.count else np.broadcast_to(value, (self.count,))

    @functools.cached_property
    def lane_in_warp(self) -> np.ndarray:
        return self.lanes % WARP
