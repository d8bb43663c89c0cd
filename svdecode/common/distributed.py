"""Several processes, as `accelerate launch` or `torchrun` start them: who am I, which items are mine, what do all have.

Alone, without a launcher, everything here is the identity, and accelerate need not be installed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """(this process, number of processes); joins the others on the first call where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError("several processes need accelerate: pip install 'svdecode[train]'") from None
    state = PartialState(cpu=not torch.cuda.is_available())  # else one process on a CPU
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise RuntimeError(f"{state.num_processes} of {os.environ['WORLD_SIZE']} processes have joined")
    return state.process_index, state.num_processes


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank_and_size()[0] == 0


def shard(items: Sequence[T]) -> Sequence[T]:
    """Every size-th item, from the rank-th on: the shares differ by one item at most."""
    rank, size = rank_and_size()
    return items[rank::size]


def gather(items: list[T]) -> list[T]:
    """All processes' items in the order of the unsharded list, if each holds its `shard` of it; an error if a rank is dead."""
    _, size = rank_and_size()
    if size == 1:
        return items
    shares: list[list[T]] = [[] for _ in range(size)]
    torch.distributed.all_gather_object(shares, items)
    joined: list[Any] = [None] * sum(len(share) for share in shares)
    for rank, share in enumerate(shares):
        joined[rank::size] = share
    return joined


def total(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor that each has."""
    if rank_and_size()[1] > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def wait() -> None:
    """Until all processes are here."""
    if rank_and_size()[1] > 1:
        torch.distributed.barrier()
