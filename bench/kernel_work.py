"""What each kernel has to do with a peaked row, and which launches an operator makes: the table that `counts.py` counts by.

Whoever rewrites a kernel changes its line here. `ways.path` looks for the shortest way through the machine code that
does the `Work`, so a line that does not fit the kernel ends in an error that says what its ways do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from inputs import LIKELY

from svdecode.kernels import settings
from svdecode.kernels.token_gradients import VECTOR

SPLIT, TILE = settings.SPLIT, settings.TILE


def _cuda_constant(name: str) -> int:
    """A constant of `csrc/cuda/block.h` that is written there as a number."""
    text = (Path(__file__).parents[1] / "csrc" / "cuda" / "block.h").read_text()
    return int(re.search(rf"constexpr int {name} = (\d+);", text)[1])


CUDA_THREADS, _CUDA_WARP = _cuda_constant("THREADS"), _cuda_constant("WARP")
CUDA_WARPS = CUDA_THREADS // _CUDA_WARP
CUDA_TILE = _cuda_constant("CHUNKS") * _CUDA_WARP * _cuda_constant("PER_LANE")
CUDA_SPLIT = CUDA_WARPS * CUDA_TILE


class Work(NamedTuple):
    """What a program does for the `tokens` that it is there for: bytes of logits read and written, exponentials, and logits
    that are read one by one, per token.

    `straight`: it goes round no loop over tiles, since it holds all of them.
    """

    tokens: int
    read: int = 0
    written: int = 0
    exponentials: float = 0
    singles: float = 0
    straight: bool = False


class Launch(NamedTuple):
    """One launch of an operator on peaked rows.

    A row has `programs(rows, V)` programs. `others` of them do `other`, since they hold a kept token or come last; the rest
    `usual`.
    `constants` are what the operator passes, on top of those of the kernel's first compiled variant. `source`: a CUDA file.
    `lookups(V)`: loads of a row's statistics that one of the others makes one after another, in loops whose rounds depend on V
    and which therefore are not in the counted way.
    """

    kernel: str
    usual: Work
    other: Work
    programs: Callable[[int, int], int]
    others: int = LIKELY
    constants: tuple[tuple[str, object], ...] = ()
    source: str | None = None
    lookups: Callable[[int], int] = lambda vocabulary: 0


class Operator(NamedTuple):
    """What an operator launches; `bytes_per_token`: the least that it can move (bfloat16 in, float32 out)."""

    bytes_per_token: int
    launches: list[Launch]
    memsets: int = 0


def splits(rows: int, vocabulary: int) -> int:
    """Programs of a row in a streaming launch, one for each split."""
    return settings.splits(vocabulary)


def groups(rows: int, vocabulary: int) -> int:
    """Programs of a row in a small launch."""
    return settings.groups(rows, settings.splits(vocabulary) * settings.TILES)[0]


def one(rows: int, vocabulary: int) -> int:
    """One program for the whole row."""
    return 1


def cuda_splits(rows: int, vocabulary: int) -> int:
    """Blocks of a row of the CUDA kernels."""
    return -(-vocabulary // CUDA_SPLIT)


def _is_short(constants: dict) -> bool:
    """Whether a split without a kept token takes the short way of `logits_gradient_kernel`."""
    return constants["DROP"] or constants["MODE"] == VECTOR.value


def _statistics(constants: dict) -> Work:
    """Of `row_statistics_kernel`; where rows begin anywhere it reads and fills token by token."""
    if constants["ALIGN"] == 1:
        return Work(SPLIT, singles=2, straight=True)
    return Work(SPLIT, read=4, written=0 if constants["FILL"] is None else 4)


STREAMS: dict[str, Callable[[dict], Work | None]] = {
    "row_statistics_kernel": _statistics,
    "tile_maxima_kernel": lambda c: Work(SPLIT, read=2),
    "logits_gradient_kernel": lambda c: Work(SPLIT, read=4 if _is_short(c) or not c["DENSE"] else 8, written=4),
}
"""The Triton kernels that read or write every token of a peaked row (bfloat16 in, float32 log-probs), by their constants.

None: this variant does not, it only visits tiles that hold a kept token."""

CUDA_STREAMS: dict[str, tuple[str, str, Work]] = {
    "CUDA steer_kernel, with KL": (
        "fused_steer.cu",
        "steer_kernel",
        Work(CUDA_SPLIT, read=4, written=4, exponentials=2),
    ),
    "CUDA steer_kernel, without KL": (
        "fused_steer.cu",
        "steer_kernel",
        Work(CUDA_SPLIT, read=4, written=4, exponentials=1),
    ),
    "CUDA sample_kernel": ("steer_sample.cu", "sample_kernel", Work(CUDA_SPLIT, read=4, exponentials=1)),
    "CUDA topk_kernel": ("steer_topk.cu", "topk_kernel", Work(CUDA_SPLIT, read=4, exponentials=1)),
}
"""Name: file, what the kernel's demangled name holds, work of a block on a peaked row."""

_NOTHING = Work(SPLIT)
# Of the tiles of a row that one program finishes, logits_ft alone is read, and for each slot one of logits_pre.
_SLOTS_PER_TOKEN = LIKELY * TILE / SPLIT / settings.SLOT
_HELD_TILES = Work(
    SPLIT, 2 * LIKELY * TILE / SPLIT, exponentials=2 * _SLOTS_PER_TOKEN, singles=_SLOTS_PER_TOKEN, straight=True
)
_STEER = (("DROP", True), ("MU", 0), ("KL_DIRECTION", True))


def constants_of(vocabulary: int) -> dict[str, int]:
    """The constants of the Triton kernels that follow from the vocabulary."""
    return {"WIDTH": settings.next_power_of_2(settings.splits(vocabulary) * settings.TILES)}


def _statistics(with_kl: bool, fill: float | None) -> Launch:
    work = Work(SPLIT, read=4, written=0 if fill is None else 4)
    return Launch("row_statistics_kernel", work, work, splits, constants=(("WITH_KL", with_kl), ("FILL", fill)))


def _dense(with_kl: bool) -> Operator:
    sums = (*_STEER, ("SUMS", True), ("STEER", True), ("WITH_KL", with_kl), ("FINISH", True))
    output = (*_STEER, ("LABELS", False), ("DENSE", True))
    return Operator(
        8,
        [
            _statistics(with_kl, -math.inf),
            Launch("kept_sums_kernel", _NOTHING, _HELD_TILES, groups, 1, constants=sums),
            Launch("steered_output_kernel", _NOTHING, _NOTHING, groups, 1, constants=output),
        ],
    )


_GREEDY = (*_STEER, ("GREEDY", True))
_CUDA_STREAM = Work(CUDA_SPLIT, read=4, written=4, exponentials=2)
# The last block of a row reads each of the LIKELY tiles with a kept token twice, a warp for each: as much again as a split.
_CUDA_LAST = Work(CUDA_SPLIT, read=4, written=4, exponentials=2)


def _rounds_over_tiles(vocabulary: int) -> int:
    """The last block looks at all tiles of its row, a thread for each, twice: to merge them and to find the kept ones."""
    return 2 * math.ceil(vocabulary / CUDA_TILE / CUDA_THREADS)


OPERATORS: dict[str, Operator] = {
    "dense with KL": _dense(True),
    "dense without KL": _dense(False),
    "greedy": Operator(
        4,
        [
            _statistics(False, None),
            Launch("sample_sums_kernel", _NOTHING, _HELD_TILES, groups, 1, constants=(*_GREEDY, ("FINISH", True))),
        ],
    ),
    "dense with KL, CUDA": Operator(
        8,
        [Launch("steer_kernel", _CUDA_STREAM, _CUDA_LAST, cuda_splits, 1, (), "fused_steer.cu", _rounds_over_tiles)],
        memsets=1,
    ),
}

BACKWARD = ("tile_maxima_kernel", "logits_gradient_kernel")
"""The passes over all tokens of the backward of `fused_steer`; of each, the variant with DROP, DENSE and MODE 0 counts."""
