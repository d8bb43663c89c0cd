"""Statistics of a whole data set: batches shared by all processes, read as often as it takes to find the strengths exactly.

A first reading of a part of the data finds where each family's minimum lies, roughly. A reading of all of them looks there
closely. Where a strength is not exact then, and only there, the data are read again. Few data cost one forward all the same:
where all logits take at most KEPT_LOGITS bytes, they are kept from one reading to the next.

Only sums are kept of a batch (`strength/token_statistics.py` states their size). The data need no length. Data that cannot be
read twice in the same order are kept in memory, as token ids.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdecode.calibration.many_batches import ManyBatches
from svdecode.calibration.statistics import BatchStatistics, GoldRows, batch_statistics, gold_rows
from svdecode.common.distributed import gather, rank_and_size, total
from svdecode.data.batches import numbered_batches
from svdecode.models.steer import steer
from svdecode.models.steered_model import SteeredModel
from svdecode.strength.family import Family
from svdecode.strength.nll_curve import NLLCurve
from svdecode.strength.refinement import full_grid, is_close, strengths_to_add
from svdecode.strength.token_statistics import GoldTokens, TokenStatistics

_PILOT = 512
"""Gold tokens of the first reading."""

_READINGS = 3
"""Of all data, at most."""

KEPT_LOGITS = 160 * 2**20
"""Bytes."""


@dataclass
class Collected:
    """The statistics of a data set, ordered as the data are."""

    curves: dict[Family, NLLCurve]
    gold: dict[Family, GoldTokens]
    """Of every family but temperatures."""
    sequences: list[bytes]
    """SHA-256 of the token ids and labels of each sequence, in order."""
    whole: bool = True
    """Whether these are all data, in all processes."""

    @property
    def sha256(self) -> str:
        """Of all sequences; independent of batch size, padding and processes."""
        return hashlib.sha256(b"".join(self.sequences)).hexdigest()

    def tokens(self, family: Family) -> TokenStatistics:
        """The statistics under one family, which is no temperature."""
        return TokenStatistics(self.gold[family], self.curves[family])

    def wanted(self, seed: int, families: Iterable[Family]) -> dict[Family, Tensor]:
        """The strengths at which some families should be known too."""
        found = {family: strengths_to_add(self.curves[family], self.gold.get(family), seed) for family in families}
        return {family: mus for family, mus in found.items() if len(mus)}

    def refine(self, other: Collected) -> None:
        """Add the strengths of another reading of the same data."""
        for family, curve in other.curves.items():
            self.curves[family] = self.curves[family].refined(curve.mus, curve.sums)


@torch.inference_mode()
def collect(
    model: PeftModel | PreTrainedModel,
    data: object,
    families: Sequence[Family],
    *,
    at: Mapping[Family, Tensor] | None = None,
    pretrained: PreTrainedModel | tuple[PreTrainedModel, PreTrainedModel] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    progress: str | None = None,
    name: str = "data",
) -> Collected:
    """The statistics of every labelled token of `data` under each family; other arguments as in `calibrate`.

    Processes started by a launcher share the batches and all get the whole: every process passes the same data. Batches are the
    same as in one process, so the result is the same to the last bit on the same kind of machine.

    Args:
        families: their directions, thresholds and penalties.
        at: strengths (M,) for each family, with 0 twice: one reading and no search. None searches.
        seed: of the halves and draws that are looked at closely.
        progress: the name of the bar; None shows none.
        name: what messages call the data.
    """
    batches = Batches(data, tokenizer, batch_size, max_length, name)
    rows = _Rows(batches, steer(model, pretrained=pretrained, mu=0.0))
    if at is not None:
        return _joined(_read(rows, at, progress), batches, at)
    grids = {family: family.coarse() for family in families}
    found = _joined(_read(rows, grids, progress, limit=_PILOT), batches, grids)
    if not found.whole:
        wanted = found.wanted(seed, families)
        grids = {family: full_grid(family, wanted.get(family, grid[:0])) for family, grid in grids.items()}
        found = _joined(_read(rows, grids, progress), batches, grids)
    for _ in range(_READINGS - 1):
        grids = found.wanted(seed, [family for family, curve in found.curves.items() if not is_close(curve)])
        if not grids:
            break
        again = _joined(_read(rows, grids, progress, tokens=False), batches, grids)
        if again.sequences != found.sequences:
            raise ValueError(f"{name} changed between two readings: pass a list, or an iterator, which is read once")
        found.refine(again)
    return found


class _Rows:
    """The gold rows of all batches of this process, with the batches' digests, as often as they are asked for."""

    def __init__(self, batches: Batches, steered: SteeredModel) -> None:
        self.batches, self._steered = batches, steered
        self._kept: list[tuple[GoldRows, list[tuple[int, bytes]]]] = []
        self._bytes = 0

    def __iter__(self) -> Iterator[tuple[GoldRows, list[tuple[int, bytes]]]]:
        kept = len(self._kept)
        yield from self._kept[:kept]
        for batch in itertools.islice(self.batches, kept, None):
            found = gold_rows(self._steered, batch), _digests(batch)
            self._bytes += found[0].bytes
            if self._bytes <= KEPT_LOGITS:
                self._kept.append(found)
            else:
                self._kept.clear()  # a part of the data would save a part of a reading, and hold its memory to the end
            yield found


class _Reading(NamedTuple):
    statistics: BatchStatistics | None  # None where this process has no batch
    digests: list[tuple[int, bytes]]
    whole: bool


def _read(
    rows: _Rows, mus: Mapping[Family, Tensor], progress: str | None, *, limit: float = math.inf, tokens: bool = True
) -> _Reading:
    """This process's share of a reading that ends after `limit` gold tokens of all processes, or with the data."""
    rank, size = rank_and_size()
    batches, numbered, seen, whole, start = ManyBatches(), [], 0, True, time.perf_counter()
    with tqdm(rows, total=rows.batches.count, desc=progress, unit="batch", disable=progress is None or rank > 0) as bar:
        for found, digests in bar:
            if seen >= limit / size:
                whole = False
                break
            part = batch_statistics(found, mus, tokens)
            batches.add(part)
            numbered += digests
            seen += int(part.gold.sum())
            bar.set_postfix_str(f"{seen} tokens, {seen / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
    return _Reading(batches.joined() if numbered else None, numbered, whole)


def _joined(reading: _Reading, batches: Batches, mus: Mapping[Family, Tensor]) -> Collected:
    """All processes' parts, in the order of the data; sequences without a gold token are left out."""
    name = batches.name
    own = 0 if reading.statistics is None else int(reading.statistics.gold.sum())
    try:
        expected = int(total(torch.tensor(own, device=_collective_device())))
        readings = gather([reading])
    except RuntimeError as error:
        raise RuntimeError(f"a process of this run is gone, its share of {name} is lost: {error}") from error
    if expected == 0 and batches.max_length is not None and any(one.digests for one in readings):
        raise ValueError(
            f"no example of {name} has a token of its completion within max_length={batches.max_length}: "
            "use a larger max_length"
        )
    if expected == 0:
        raise ValueError(f"{name} has no labelled token: it is empty, or all labels are -100")
    together = ManyBatches()
    for one in readings:
        if one.statistics is not None:
            together.add(one.statistics)
    joined = together.joined()
    if int(joined.gold.sum()) != expected:
        raise RuntimeError(f"the processes saw {expected} tokens of {name} and passed on {int(joined.gold.sum())}")
    order = joined.sequence.argsort(stable=True)
    order = order[joined.gold[order] > 0]
    curves, gold = {}, {}
    for family, sums in joined.families.items():
        curves[family] = NLLCurve(
            mus[family], sums.curve[order], sums.ends[order], sums.scored[order], joined.gold[order]
        )
        if sums.tokens is not None:
            broken = int((~sums.tokens.moments.isfinite().all(-1)).sum())
            if broken:
                raise ValueError(
                    f"the models' logits are NaN or infinite at {broken} of {expected} gold tokens of {name}"
                )
            gold[family] = sums.tokens.select(sums.tokens.sequence.argsort(stable=True))
    numbered = sorted(pair for one in readings for pair in one.digests)
    return Collected(curves, gold, [digest for _, digest in numbered], all(one.whole for one in readings))


class Batches:
    """The batches of this process, as often as they are asked for.

    Lists and Datasets are read again. Of anything else, which may come in another order or not at all, the batches are kept.
    """

    def __init__(
        self,
        data: object,
        tokenizer: PreTrainedTokenizerBase | None,
        batch_size: int,
        max_length: int | None,
        name: str = "data",
    ) -> None:
        self.name, self.max_length = name, max_length
        self._arguments = (data, tokenizer, batch_size, max_length, name)
        first, count = numbered_batches(*self._arguments)
        rank, size = rank_and_size()
        self.count = None if count is None else len(range(rank, count, size))
        """Of this process; None where it is not known."""
        self._rest: Iterator | None = self._share(first)
        self._again = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        self._kept: list[dict[str, Tensor]] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._again:
            rest, self._rest = self._rest, None
            yield from rest or self._share(numbered_batches(*self._arguments)[0])
            return
        yield from self._kept
        for batch in self._rest or ():
            self._kept.append(batch)
            yield batch

    @staticmethod
    def _share(found: Iterator) -> Iterator:
        rank, size = rank_and_size()
        return itertools.islice(found, rank, None, size)


def _collective_device() -> torch.device:
    """Where a tensor must lie for the processes to add it up."""
    several = rank_and_size()[1] > 1 and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if several else torch.device("cpu")


def _digests(batch: Mapping[str, Tensor]) -> list[tuple[int, bytes]]:
    """(number, SHA-256 of ids and labels without the padding) of each row."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    rows = []
    for number, row, label, used in zip(batch["sequence"].tolist(), ids, labels, mask, strict=True):
        both = torch.stack([row[used], label[used]]).to(torch.int64)
        rows.append((number, hashlib.sha256(both.numpy().tobytes()).digest()))
    return rows
