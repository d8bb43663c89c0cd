"""Global memory: the host's allocations, and where an address lies in them."""

from __future__ import annotations

import bisect
import ctypes

import numpy as np
import torch

from ptx.dtypes import S64, Fault


class Allocation:
    """Bytes that a kernel may touch. Races are looked for in places of `granule` bytes, an element of the tensor."""

    def __init__(self, address: int, data: np.ndarray, granule: int) -> None:
        self.address, self.data, self.granule = address, data, granule
        self.end = address + data.size
        self.places = -(-data.size // granule)
        self.views: dict[np.dtype, np.ndarray] = {}

    def view(self, dtype: np.dtype) -> np.ndarray:
        """The bytes as elements."""
        found = self.views.get(dtype)
        if found is None:
            whole = self.data[: self.data.size // dtype.itemsize * dtype.itemsize]
            found = self.views[dtype] = whole.view(dtype)
        return found


class Memory:
    """All allocations of a launch. An address outside them is a fault."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._found: list[Allocation] = []

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """The whole storage of a CPU tensor, also what is outside a view of it."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return
        size, address = storage.nbytes(), storage.data_ptr()
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self.add(address, data, min(tensor.element_size(), 4))

    def add(self, address: int, data: np.ndarray, granule: int = 4) -> None:
        """data: uint8, alive as long as the launch."""
        at = bisect.bisect_left(self._starts, address)
        if at < len(self._starts) and self._starts[at] == address:
            return
        self._starts.insert(at, address)
        self._found.insert(at, Allocation(address, data, granule))

    def locate(self, address: np.ndarray, size: int) -> list[tuple[Allocation, np.ndarray | slice, np.ndarray]]:
        """(allocation, which of the accesses, their offsets in it); one entry where all accesses are in one allocation.

        Raises:
            Fault: an access that is misaligned or not inside one allocation.
        """
        step = np.uint64(size)
        if (address % step).any():
            wrong = int(address[np.flatnonzero(address % step)[0]])
            raise Fault(
                f"a misaligned access: {size} bytes at address {wrong:#x}, which is {wrong % size} past a multiple"
            )
        low, high = int(address.min()), int(address.max())
        allocation = self._at(low)
        if high + size <= allocation.end:
            return [(allocation, slice(None), (address - np.uint64(allocation.address)).astype(S64))]
        found = []
        left = np.ones(address.size, bool)
        while left.any():
            allocation = self._at(int(address[left].min()))
            inside = left & (address >= np.uint64(allocation.address)) & (address < np.uint64(allocation.end))
            if (address[inside] + step > np.uint64(allocation.end)).any():
                raise Fault(
                    f"an access of {size} bytes runs over the end of an allocation of {allocation.data.size} bytes"
                )
            chosen = np.flatnonzero(inside)
            found.append((allocation, chosen, (address[chosen] - np.uint64(allocation.address)).astype(S64)))
            left &= ~inside
        return found

    def _at(self, address: int) -> Allocation:
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._found[at].end:
            nearest = (
                f"; {address - self._found[at].end} bytes past the end of the nearest before it" if at >= 0 else ""
            )
            raise Fault(f"an access outside every allocation: address {address:#x}{nearest}")
        return self._found[at]
