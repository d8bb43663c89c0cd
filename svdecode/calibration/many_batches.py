"""The statistics of many batches, in one block of memory per field.

A batch's logits and dense results take tens of megabytes, are freed and are made again for the next batch. Small results that
were kept among them, each where it was made, would hold the C library's memory apart: the next batch finds no place, and the
process grows. They are therefore copied to the end of a block of their own.
"""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from svdecode.calibration.statistics import BatchStatistics, Sums
from svdecode.strength.family import Family
from svdecode.strength.token_statistics import GoldTokens

_FIRST = 256
"""Rows that a block has room for at first; it doubles when it is full."""

_SEQUENCE, _SUMS = ("sequence", "gold"), ("curve", "ends", "scored")
_TOKENS = tuple(GoldTokens.__dataclass_fields__)


class ManyBatches:
    """BatchStatistics of one set of families, added up to one."""

    def __init__(self) -> None:
        """Begin with none."""
        self._columns: dict[tuple[Family | None, str], _Column] = defaultdict(_Column)

    def add(self, part: BatchStatistics) -> None:
        """Append one."""
        self._append(None, _SEQUENCE, part)
        for family, sums in part.families.items():
            self._append(family, _SUMS, sums)
            if sums.tokens is not None:
                self._append(family, _TOKENS, sums.tokens)

    def joined(self) -> BatchStatistics:
        """All of them, in the order in which they came; one at least was added."""
        families = {}
        for family in dict.fromkeys(family for family, _ in self._columns if family is not None):
            has_tokens = (family, _TOKENS[0]) in self._columns
            tokens = GoldTokens(*self._rows(family, _TOKENS)) if has_tokens else None
            families[family] = Sums(*self._rows(family, _SUMS), tokens)
        return BatchStatistics(*self._rows(None, _SEQUENCE), families)

    def _append(self, family: Family | None, names: tuple[str, ...], part: object) -> None:
        for name in names:
            self._columns[family, name].append(getattr(part, name))

    def _rows(self, family: Family | None, names: tuple[str, ...]) -> list[Tensor]:
        return [self._columns[family, name].rows for name in names]


class _Column:
    """Tensors of one dtype and row shape, one after the other."""

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._used = 0

    def append(self, rows: Tensor) -> None:
        needed = self._used + len(rows)
        if self._block is None:
            self._block = rows.new_empty(max(needed, _FIRST), *rows.shape[1:])
        elif needed > len(self._block):
            grown = rows.new_empty(max(needed, 2 * len(self._block)), *rows.shape[1:])
            grown[: self._used] = self._block[: self._used]
            self._block = grown
        self._block[self._used : needed] = rows
        self._used = needed

    @property
    def rows(self) -> Tensor:
        """A copy: a view would drag the whole block to wherever it is sent."""
        assert self._block is not None
        return self._block[: self._used].clone()
