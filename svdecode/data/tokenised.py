"""Rows that are tokenised already (input_ids, labels, attention_mask), as sequences without padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from svdecode.constants import IGNORE_INDEX

_LENGTHS = ("seq_lengths", "seq_lens")
"""Columns that say how long the sequences of a packed row are."""


def is_tokenised(row: object) -> bool:
    """Whether something is one row with input_ids, and not a batch of them."""
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    if isinstance(ids, Tensor):
        return ids.dim() == 1
    return ids is not None and len(ids) > 0 and getattr(ids[0], "__len__", None) is None and not _is_row(ids[0])


def _is_row(value: object) -> bool:
    return getattr(value, "ndim", 0) > 0


def sequences_of(rows: Iterable[object], name: str, max_length: int | None = None) -> Iterator[dict[str, list[int]]]:
    """{"input_ids", "labels"} of each sequence of each row: padding is left out, and a packed row has several sequences.

    Args:
        rows: {"input_ids", "labels"} each, and perhaps "attention_mask", "position_ids" or "seq_lengths" (a packed row).
        name: what messages call the data.
        max_length: longer sequences are cut after so many tokens.

    Raises:
        ValueError: a row without labels, columns of different lengths, positions that do not count from 0, or images.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not {"input_ids", "labels"} <= set(row):
            raise ValueError(f"{name}[{number}] needs input_ids and labels (-100 for tokens that are not counted)")
        for column, value in row.items():
            if getattr(value, "ndim", 1) > 1 or getattr(value, "is_floating_point", bool)():
                raise ValueError(f"{name}[{number}] has {column}: pass batches, from a DataLoader with your collator")
        ids, labels = torch.as_tensor(row["input_ids"]).long(), torch.as_tensor(row["labels"]).long()
        mask = torch.as_tensor(row["attention_mask"]) if "attention_mask" in row else torch.ones_like(ids)
        if not ids.shape == labels.shape == mask.shape:
            raise ValueError(f"{name}[{number}]: input_ids, labels and attention_mask have different lengths")
        used = mask.bool()
        ids, labels = ids[used], labels[used]
        for start, end in itertools.pairwise(_bounds(row, used, f"{name}[{number}]")):
            own = slice(start, end if max_length is None else min(end, start + max_length))
            # The first token of a sequence has nothing before it that could predict it.
            first = torch.full_like(labels[start : start + 1], IGNORE_INDEX)
            yield {
                "input_ids": ids[own].tolist(),
                "labels": torch.cat([first, labels[own][1:]]).tolist(),
            }


def _bounds(row: Mapping[str, object], used: Tensor, place: str) -> list[int]:
    """Where the sequences of a row begin, and where the last one ends."""
    count = int(used.sum())
    lengths = next((row[column] for column in _LENGTHS if column in row), None)
    if lengths is not None:
        bounds = [0, *itertools.accumulate(int(length) for length in lengths)]
    elif "position_ids" in row:
        positions = torch.as_tensor(row["position_ids"]).long()[used]
        bounds = [*(positions == 0).nonzero().squeeze(-1).tolist(), count]
        counted = [torch.arange(end - start) for start, end in itertools.pairwise(bounds)]
        if not counted or bounds[0] != 0 or not torch.equal(torch.cat(counted), positions):
            raise ValueError(f"{place}: position_ids must count from 0 in each sequence")
    else:
        bounds = [0, count]
    if bounds[-1] != count:
        raise ValueError(f"{place}: the lengths of its sequences sum to {bounds[-1]}, and it has {count} tokens")
    return bounds
