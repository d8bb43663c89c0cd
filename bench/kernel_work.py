"""What each kernel has to do with a peaked row, and which launches an operator makes: the table that `counts.py` counts by.

Whoever rewrites a kernel changes its line here. `ways.path` looks for the shortest way through the machine code that
does the `Work`, so a line that does not fit the kernel ends in an error that says what its ways do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from inputs import LIKELY

SPLIT = 4096
"""Tokens of a program of the Triton kernels that stream; of the CUDA kernels: CUDA_SPLIT."""
TILE = 1024
CUDA_SPLIT, CUDA_WARPS = 2048, 8


class Work(NamedTuple):
    """What a program does for the `tokens` that it is there for: bytes of logits read and written, exponentials, per token."""

    tokens: int
    read: int = 0
    written: int = 0
    exponentials: int = 0


class Launch(NamedTuple):
    """One launch of an operator on peaked rows.

    A row has `programs(V)` programs. `others` of them do `other`, since they hold a kept token or come last; the rest `usual`.
    `constants` are what the operator passes, on top of those of the kernel's first compiled variant. `source`: a CUDA file.
    `lookups(V)`: loads of a row's statistics that one of the others makes one after another, in loops whose rounds depend on V
    and which therefore are not in the counted way.
    """

    kernel: str
    usual: Work
    other: Work
    programs: Callable[[int], int]
    others: int = LIKELY
    constants: tuple[tuple[str, object], ...] = ()
    source: str | None = None
    lookups: Callable[[int], int] = lambda vocabulary: 0


class Operator(NamedTuple):
    """What an operator launches; `bytes_per_token`: the least that it can move (bfloat16 in, float32 out)."""

    bytes_per_token: int
    launches: list[Launch]
    memsets: int = 0


def splits(vocabulary: int) -> int:
    """Programs of a row, one for each split."""
    return -(-vocabulary // SPLIT)


def one(vocabulary: int) -> int:
    """One program for the whole row."""
    return 1


def cuda_splits(vocabulary: int) -> int:
    """Blocks of a row of the CUDA kernels."""
    return -(-vocabulary // CUDA_SPLIT)


def _statistics(constants: dict) -> Work:
    return Work(SPLIT, read=4, written=4 if constants.get("FILL") else 0)


STREAMS: dict[str, Callable[[dict], Work | None]] = {
    "row_statistics_kernel": _statistics,
    "kept_sums_kernel": lambda c: Work(SPLIT, written=4) if c["DROP"] and c["FILL"] else None,
    "steered_output_kernel": lambda c: Work(SPLIT, read=2, written=4) if c["DENSE"] and not c["DROP"] else None,
    "steering_vector_kernel": lambda c: Work(SPLIT, written=4),
    "steer_gradient_sums_kernel": lambda c: Work(SPLIT, read=2 if c["DROP"] else 8),
    "delta_gradient_sums_kernel": lambda c: Work(SPLIT, read=2),
    "logits_gradient_kernel": lambda c: Work(SPLIT, read=4 if c["DROP"] or not c["DENSE"] else 8, written=4),
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
_READ = Work(SPLIT, read=4)
_ONE_TILE = Work(SPLIT, read=4 * TILE // SPLIT)
_STEER = (("DROP", True), ("MU", 0), ("KL_DIRECTION", True))


def constants_of(vocabulary: int) -> dict[str, int]:
    """The constants of the Triton kernels that follow from the vocabulary."""
    return {"SPLITS": 1 << (splits(vocabulary) - 1).bit_length()}


def _statistics_launch(with_kl: bool) -> Launch:
    return Launch("row_statistics_kernel", _READ, _READ, splits, constants=(("WITH_KL", with_kl),))


def _dense(with_kl: bool) -> Operator:
    sums = (*_STEER, ("SUMS", True), ("STEER", True), ("FILL", True))
    output = (*_STEER, ("LABELS", False), ("WITH_KL", with_kl), ("DENSE", True))
    fill, tile_and_fill = Work(SPLIT, written=4), _ONE_TILE._replace(written=4)
    return Operator(
        8,
        [
            _statistics_launch(with_kl),
            Launch("kept_sums_kernel", fill, _ONE_TILE, splits, constants=sums),
            Launch("steered_output_kernel", _NOTHING, tile_and_fill, splits, constants=output),
        ],
    )


_GREEDY = (*_STEER, ("GREEDY", True))
_CUDA_STREAM = Work(CUDA_SPLIT, read=4, written=4, exponentials=2)
# The last block of a row reads each of the LIKELY splits with a kept token twice: for their normaliser and for their log-probs.
_CUDA_LAST = Work(CUDA_SPLIT, read=4 + 8 * LIKELY, written=4 + 4 * LIKELY)


def _twice_each_split(vocabulary: int) -> int:
    return 2 * cuda_splits(vocabulary)


OPERATORS: dict[str, Operator] = {
    "dense with KL": _dense(True),
    "dense without KL": _dense(False),
    "greedy": Operator(
        4,
        [
            _statistics_launch(False),
            Launch("sample_sums_kernel", _NOTHING, _ONE_TILE, splits, constants=_GREEDY),
            Launch("pick_token_kernel", _NOTHING, _NOTHING, one, constants=_GREEDY),
        ],
    ),
    "dense with KL, CUDA": Operator(
        8,
        [Launch("steer_kernel", _CUDA_STREAM, _CUDA_LAST, cuda_splits, 1, (), "fused_steer.cu", _twice_each_split)],
        memsets=1,
    ),
}

BACKWARD = ("steer_gradient_sums_kernel", "delta_gradient_sums_kernel", "logits_gradient_kernel")
"""The passes over all tokens of the backward of `fused_steer`; of each, the variant with DROP, DENSE and MODE 0 counts."""
