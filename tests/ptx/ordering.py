"""Which memory accesses are ordered, and faults where two that touch the same place are not.

Every access to a place leaves a stamp: the time on the launch's clock, the block and the warp. Two accesses by different warps,
one of them a write, must have something between them: in one block a barrier; in two blocks of one launch a release and an
acquire, which is a fence, an atomic on one address by both, and a fence again. What one warp has acquired the others of its
block may read after their next barrier. Threads of one warp are taken to run in step.
One instruction by which several warps write one value to one place is let through: Triton's compiler writes such.
"""

from __future__ import annotations

import numpy as np

from ptx.dtypes import S64, Fault

_TIME, _WARP = 32, 6  # a stamp is time << 32 | block << 6 | warp
_WHO = np.int64((1 << _TIME) - 1)
Seen = dict[int, np.ndarray]
"""Block to the time, for each of its warps, up to which its writes are seen."""
READ_AFTER_WRITE = "read with no {between} since another {who} wrote it"
WRITE_AFTER_WRITE = "written with no {between} since another {who} wrote it"
WRITE_AFTER_READ = "written with no {between} since another {who} read it"


class _Stamps:
    """The last write of each place, its last read, and the last reads by another warp and by another block than that."""

    def __init__(self, places: int) -> None:
        self.written, self.read, self.other_read, self.other_block = (np.zeros(places, S64) for _ in range(4))

    def note_read(self, places: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Gives the stamps of the writes that are read."""
        before = self.read[places]
        another = (before & _WHO) != (mine & _WHO)
        self.other_read[places[another]] = before[another]
        elsewhere = (before ^ mine) & _WHO >= 1 << _WARP
        self.other_block[places[elsewhere]] = before[elsewhere]
        self.read[places] = mine
        lost = self.read[places] != mine  # another warp reads it in the same instruction
        if lost.any():
            self.other_read[places[lost]] = mine[lost]
            elsewhere = lost & ((self.read[places] ^ mine) & _WHO >= 1 << _WARP)
            self.other_block[places[elsewhere]] = mine[elsewhere]
        return self.written[places]

    def note_write(self, places: np.ndarray, mine: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Gives the stamps of what was there before, each with what it means if it is not ordered."""
        before = [
            (WRITE_AFTER_WRITE, self.written[places]),
            (WRITE_AFTER_READ, self.read[places]),
            (WRITE_AFTER_READ, self.other_read[places]),
            (WRITE_AFTER_READ, self.other_block[places]),
        ]
        self.written[places] = mine
        return before


class SharedOrder:
    """Shared memory of the blocks that run together. A place is a granule: the smallest access of the kernel."""

    def __init__(self, shape: tuple[int, int], granule: int, blocks: int) -> None:
        self.per_block = shape[1] // granule
        self.granule = granule
        self.stamps = _Stamps(blocks * self.per_block)

    def places(self, slot: np.ndarray, offset: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """(places, how many each access has)."""
        count = max(1, size // self.granule)
        first = slot * self.per_block + offset // self.granule
        return (first if count == 1 else (first[:, None] + np.arange(count)).ravel()), count

    def access(
        self,
        slot: np.ndarray,
        offset: np.ndarray,
        size: int,
        warp: np.ndarray,
        since: np.ndarray,
        now: int,
        store: bool,
    ) -> None:
        """since: the time of each block's last barrier.

        Raises:
            Fault: a race, or a read of what nothing has written.
        """
        places, count = self.places(slot, offset, size)
        if count > 1:
            warp, since = np.repeat(warp, count), np.repeat(since, count)
        mine = warp | np.int64(now << _TIME)
        if store:
            before = self.stamps.note_write(places, mine)
        else:
            written = self.stamps.note_read(places, mine)
            if not written.all():
                raise Fault("shared memory is read that nothing has written")
            before = [(READ_AFTER_WRITE, written)]
        for what, stamp in before:
            racing = (stamp >> _TIME > since) & ((stamp & _WHO) != warp)
            if racing.any():
                raise Fault("shared memory is " + what.format(between="barrier", who="warp"))


class GlobalOrder:
    """Global memory in one launch. Reads of an allocation that nothing has written yet are only remembered."""

    def __init__(self, blocks: int, warps: int) -> None:
        self.clock = 1
        self.barrier = np.zeros(blocks, S64)  # when each block last passed one
        self.warps = warps
        self._stamps: dict[int, _Stamps] = {}
        self._reads: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._performed: dict[int, np.ndarray] = {}  # block: by warp, the time up to which its writes are seen by all
        self._released: dict[int, Seen] = {}  # address: what an atomic there has published
        self._pending: dict[int, Seen] = {}  # warp: what its atomics read, until its next fence
        self._acquired: dict[
            int, dict[int, tuple[int, Seen]]
        ] = {}  # block: by warp, when it acquired what, since a barrier
        self._visible: dict[int, Seen] = {}  # block: what all its warps may read

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def access(
        self, allocation: int, places: np.ndarray, total: int, block: np.ndarray, warp: np.ndarray, store: bool
    ) -> None:
        """Note an access; `total` is the number of places that the allocation has.

        Raises:
            Fault: a race with another warp of the block or with another block.
        """
        now = self.tick()
        who = block << _WARP | warp
        mine = who | np.int64(now << _TIME)
        stamps = self._stamps.get(allocation)
        if stamps is None:
            if not store:
                self._reads.setdefault(allocation, []).append((places, mine))
                return
            stamps = self._stamps[allocation] = _Stamps(total)
            for earlier, theirs in self._reads.pop(allocation, ()):
                stamps.note_read(earlier, theirs)
        before = stamps.note_write(places, mine) if store else [(READ_AFTER_WRITE, stamps.note_read(places, mine))]
        for what, stamp in before:
            foreign = (stamp != 0) & ((stamp & _WHO) != who)
            if foreign.any():
                self._check(what, stamp[foreign], who[foreign])

    def _check(self, what: str, stamp: np.ndarray, mine: np.ndarray) -> None:
        """mine: block and warp of each access."""
        time, theirs = stamp >> _TIME, stamp & _WHO
        block = mine >> _WARP
        same = theirs >> _WARP == block
        if (same & (time > self.barrier[block])).any():
            raise Fault("global memory is " + what.format(between="barrier", who="warp of the block"))
        if same.all():
            return
        for me in np.unique(mine[~same]):
            seen = self._seen_by(int(me))
            by_me = ~same & (mine == me)
            for other in np.unique(theirs[by_me]):
                performed = seen.get(int(other) >> _WARP)
                latest = time[by_me & (theirs == other)].max()
                if performed is None or latest > performed[other & ((1 << _WARP) - 1)]:
                    raise Fault("global memory is " + what.format(between="release and acquire", who="block"))

    def _seen_by(self, who: int) -> Seen:
        """What a warp may read of other blocks."""
        self._pass_on(who >> _WARP)
        seen = dict(self._visible.get(who >> _WARP, {}))
        _join(seen, self._acquired.get(who >> _WARP, {}).get(who, (0, {}))[1])
        return seen

    def _pass_on(self, block: int) -> None:
        """A barrier of a block shows all its warps what one of them acquired before it."""
        acquired = self._acquired.get(block, {})
        for who in [who for who, (when, _) in acquired.items() if when < self.barrier[block]]:
            _join(self._visible.setdefault(block, {}), acquired.pop(who)[1])

    def _acquire(self, who: int) -> None:
        """A warp may read from now on what its atomics have read of other blocks' releases."""
        block = who >> _WARP
        self._pass_on(block)
        acquired = self._acquired.setdefault(block, {})
        seen = acquired.get(who, (0, {}))[1]
        _join(seen, self._pending.pop(who, {}))
        if seen:
            acquired[who] = (self.tick(), seen)

    def fence(self, block: np.ndarray, warp: np.ndarray) -> None:
        """A fence at the scope of the GPU: what the warp wrote, and saw before its last barrier, is seen by all."""
        now = self.tick()
        for b, w in set(zip(block.tolist(), warp.tolist(), strict=True)):
            performed = self._performed.setdefault(b, np.zeros(self.warps, S64))
            np.maximum(performed, self.barrier[b], out=performed)
            performed[w] = now
            self._acquire(b << _WARP | w)

    def atomic(self, address: int, block: int, release: bool, acquire: bool, warp: int) -> None:
        """One thread's atomic (or its strong read, or strong write) at an address."""
        if release:
            self.fence(np.array([block]), np.array([warp]))
        who = block << _WARP | warp
        published = self._released.setdefault(address, {})
        _join(self._pending.setdefault(who, {}), published)
        mine = self._seen_by(who)
        if block in self._performed:
            mine[block] = self._performed[block]
        _join(published, mine)
        if acquire:
            self._acquire(who)


def _join(into: Seen, other: Seen) -> None:
    for block, performed in other.items():
        into[block] = np.maximum(into[block], performed) if block in into else performed.copy()
