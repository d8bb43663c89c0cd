"""Prompts and completions as batches of token ids, labels on the completion only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from svdecode.constants import IGNORE_INDEX

COLUMNS = ("prompt", "completion")


def check_examples(examples: object) -> list[dict[str, str]]:
    """A non-empty list of {"prompt", "completion"} from a list or a Dataset with those columns; ValueError otherwise."""
    columns = getattr(examples, "column_names", None)
    if columns is not None and not set(COLUMNS) <= set(columns):
        raise ValueError(f"data needs the columns {' and '.join(COLUMNS)}, got {', '.join(columns) or 'none'}")
    rows = list(examples)
    if not rows:
        raise ValueError("data is empty")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(row.get(column), str) for column in COLUMNS):
            raise ValueError(f"data[{index}] must be a mapping with the texts {' and '.join(COLUMNS)}, got {row!r:.80}")
    return rows


def read_examples(path: str | Path) -> list[dict[str, str]]:
    """Examples from a JSONL file, one {"prompt", "completion"} a line; ValueError names the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    try:
        return check_examples(rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def encode(example: Mapping[str, str], tokenizer: object, max_length: int | None = None) -> dict[str, list[int]]:
    """Token ids of prompt + completion + end-of-sequence, and labels that ignore the prompt."""
    prompt = tokenizer(example["prompt"]).input_ids
    completion = tokenizer(example["completion"], add_special_tokens=False).input_ids
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    ids = (prompt + completion)[:max_length]
    labels = ([IGNORE_INDEX] * len(prompt) + completion)[:max_length]
    return {"input_ids": ids, "labels": labels}


def collate(encoded: Iterable[Mapping[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A right-padded batch: input_ids, attention_mask, labels, each (B, T) int64."""
    encoded = list(encoded)
    width = max(len(row["input_ids"]) for row in encoded)

    def padded(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in encoded])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in encoded])
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": padded("labels", IGNORE_INDEX)}


def pad_token_id(tokenizer: object) -> int:
    """The tokenizer's pad token, or its end-of-sequence token, or 0: padded positions are masked anyway."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def batches(data: object, tokenizer: object | None, batch_size: int) -> tuple[Iterator[dict[str, Tensor]], int | None]:
    """Batches with input_ids, attention_mask and labels, and their number where it is known.

    Args:
        data: a list of {"prompt", "completion"}, a Dataset with those columns, or an iterable of such batches.
        tokenizer: needed for texts.
        batch_size: of texts; ready batches keep theirs.
    """
    if isinstance(data, list) or hasattr(data, "column_names"):
        is_batch = isinstance(data, list) and data and isinstance(data[0], Mapping) and "input_ids" in data[0]
        if not is_batch:
            examples = check_examples(data)
            if tokenizer is None:
                raise ValueError("tokenizer is needed where data are texts")
            encoded = [encode(example, tokenizer) for example in examples]
            # Neighbours of like length waste little padding; the result does not depend on the order.
            encoded.sort(key=lambda row: len(row["input_ids"]))
            chunks = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
            return (collate(chunk, pad_token_id(tokenizer)) for chunk in chunks), len(chunks)
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"data must be a list of texts, a Dataset or an iterable of batches, got {type(data).__name__}")
    return _checked(data), len(data) if hasattr(data, "__len__") else None


def _checked(data: Iterable[object]) -> Iterator[dict[str, Tensor]]:
    for index, batch in enumerate(data):
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            raise ValueError(f"batch {index} of data needs input_ids and labels (and attention_mask)")
        yield dict(batch)
