"""Texts as token ids and padded batches, with labels on the completions only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from svdecode.constants import IGNORE_INDEX
from svdecode.data.chat import encode_conversation
from svdecode.data.conversations import CHAT_COLUMNS, is_conversation
from svdecode.data.examples import COLUMNS, check_examples
from svdecode.data.tokenised import is_tokenised, sequences_of
from svdecode.ops import validation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 64
"""Batches of texts that are read and tokenised at a time."""


def encode(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> dict[str, list[int]]:
    """Token ids of prompt + completion + end-of-sequence, and labels that ignore the prompt; of a conversation its own."""
    if is_conversation(example):
        return {name: ids[:max_length] for name, ids in encode_conversation(example, tokenizer).items()}
    prompt = prompt_ids(example["prompt"], tokenizer)
    completion = tokenizer(example["completion"], add_special_tokens=False).input_ids
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    return {name: ids[:max_length] for name, ids in with_prompt(prompt, completion).items()}


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that goes on: with the special tokens in front, and without those that a tokenizer puts behind."""
    ids = list(tokenizer(text).input_ids)
    own = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not own:
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    for end in range(len(ids), len(own) - 1, -1):
        # From the end: where the text's own last token is a special one, the longest match is the whole.
        if ids[end - len(own) : end] == own:
            return ids[:end]
    return ids


def with_prompt(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    """Token ids of a prompt and its answer, and labels that ignore the prompt."""
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}


def padded(rows: Iterable[list[int]], filler: int, side: str = "right") -> Tensor:
    """(B, T) int64: rows of different lengths, filled up on the "right" or on the "left"."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=filler, padding_side=side)


def collate(encoded: Iterable[Mapping[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A right-padded batch: input_ids, attention_mask, labels, each (B, T) int64."""
    encoded = list(encoded)
    return {
        "input_ids": padded([row["input_ids"] for row in encoded], pad),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in encoded], 0),
        "labels": padded([row["labels"] for row in encoded], IGNORE_INDEX),
    }


def prompts_batch(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded prompts for generation and their attention mask, (B, T) int64 each."""
    ids, mask = padded(prompts, pad, "left"), padded([[1] * len(row) for row in prompts], 0, "left")
    return ids.to(device), mask.to(device)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token, or its end-of-sequence token, or 0: padded positions are masked anyway."""
    ids: Any = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)


def numbered_batches(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int,
    max_length: int | None = None,
    name: str = "data",
) -> tuple[Iterator[dict[str, Tensor]], int | None]:
    """Batches with input_ids, labels, perhaps attention_mask, and `sequence`, (B,) each row's index in the data.

    Args:
        data: examples as {"prompt", "completion"}, or conversations (`svdecode.data.conversations`): a list, a Dataset or any
            iterable, which is read `WINDOW` batches at a time; or rows with `input_ids` and `labels` that are tokenised
            already (`tokenised.py`); or an iterable of batches. Lengths are not needed.
        tokenizer: needed for texts.
        batch_size: of texts; ready batches keep theirs.
        max_length: longer texts are cut after so many tokens.
        name: what messages call the data.

    Returns:
        The batches and their number, None where it is not known.
    """
    validation.check_count("batch_size", batch_size)
    if max_length is not None:
        validation.check_count("max_length", max_length)
    if isinstance(tokenizer, str):
        raise TypeError(
            f"tokenizer must be a tokenizer, got a name: AutoTokenizer.from_pretrained({tokenizer!r}) makes one"
        )
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        kind, remedy = type(data).__name__, ""
        if isinstance(data, str):
            remedy = f": svdecode.data.examples.read_examples({data!r}) reads a file"
        raise TypeError(f"{name} must be a list of texts, a Dataset or an iterable of batches, got {kind}{remedy}")
    length = known_length(data)
    iterator = iter(data)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{name} is empty")
    rest = itertools.chain([first], iterator)
    columns = getattr(data, "column_names", None)
    known = {*COLUMNS, *CHAT_COLUMNS, "input_ids"}
    if columns is not None and isinstance(first, Mapping) and not known & set(first):
        raise ValueError(f"{name} needs the columns {' and '.join(COLUMNS)}, got {', '.join(columns)}")
    if is_tokenised(first):
        filler = 0 if tokenizer is None else pad_token_id(tokenizer)
        return _collated(sequences_of(rest, name, max_length), filler, batch_size), None
    if isinstance(first, Mapping) and "input_ids" in first:
        return _ready(rest, name), length
    check_examples(data if isinstance(data, list) else [first])
    if tokenizer is None:
        raise ValueError(f"tokenizer is needed where {name} are texts")
    return _encoded(rest, tokenizer, batch_size, max_length), None if length is None else -(-length // batch_size)


def _ready(data: Iterable[object], name: str) -> Iterator[dict[str, Tensor]]:
    start = 0
    for index, batch in enumerate(data):
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            raise ValueError(f"batch {index} of {name} needs input_ids and labels (and attention_mask)")
        rows = len(batch["input_ids"])
        yield {**batch, "sequence": torch.arange(start, start + rows)}
        start += rows


def known_length(data: object) -> int | None:
    """len(data); None where it has none, as a DataLoader of a stream, whose __len__ raises."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


def _encoded(
    examples: Iterable[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int | None
) -> Iterator[dict[str, Tensor]]:
    numbered = iter(examples)
    encoded = (
        encode(example, tokenizer, max_length)
        for window in iter(lambda: list(itertools.islice(numbered, WINDOW * batch_size)), [])
        for example in check_examples(window)
    )
    return _collated(encoded, pad_token_id(tokenizer), batch_size)


def _collated(rows: Iterable[Mapping[str, list[int]]], pad: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Right-padded batches of rows of token ids."""
    numbered = enumerate(rows)
    while encoded := list(itertools.islice(numbered, WINDOW * batch_size)):
        # Neighbours of like length waste little padding; the result does not depend on the order.
        encoded.sort(key=lambda pair: len(pair[1]["input_ids"]))
        for i in range(0, len(encoded), batch_size):
            chunk = encoded[i : i + batch_size]
            batch = collate([row for _, row in chunk], pad)
            yield {**batch, "sequence": torch.tensor([number for number, _ in chunk])}
