"""Token statistics of a whole data set: a stream of batches, shared by all processes, in bounded memory.

Texts are read and tokenised `WINDOW` batches at a time, the statistics of a batch are all that outlives it (their size is
stated in `token_statistics.py`), and the data need no length.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from svdecode import validation
from svdecode.constants import ALPHA, KL
from svdecode.data import COLUMNS, check_examples, collate, encode, pad_token_id
from svdecode.distributed import gather, rank_and_size, total
from svdecode.token_statistics import TokenStatistics, token_statistics

WINDOW = 64


class Collected(NamedTuple):
    """The statistics of a data set, ordered as the data are."""

    tokens: TokenStatistics
    sha256: str
    """Of each sequence's token ids and labels, in order: the same for every batch size, padding and number of processes."""


def collect_tokens(
    model: object,
    data: object,
    *,
    pretrained: object | None = None,
    tokenizer: object | None = None,
    alpha: float = ALPHA,
    direction: str = KL,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: str | None = None,
) -> TokenStatistics:
    """The statistics of every labelled token of `data`; arguments as in `calibrate`, `progress` names the bar."""
    return collect(
        model,
        data,
        pretrained=pretrained,
        tokenizer=tokenizer,
        alpha=alpha,
        direction=direction,
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
    ).tokens


@torch.inference_mode()
def collect(
    model: object,
    data: object,
    *,
    pretrained: object | None,
    tokenizer: object | None,
    alpha: float,
    direction: str,
    batch_size: int,
    max_length: int | None = None,
    progress: str | None = None,
    name: str = "data",
) -> Collected:
    """As `collect_tokens`, with the data's hash. Processes started by a launcher share the batches and all get the whole.

    Every process passes the same data. Batches are the same as in one process, so the result is the same to the last bit on
    the same kind of machine.
    """
    from svdecode.steering import steer

    validation.check_settings(alpha, direction)
    found, count = numbered_batches(data, tokenizer, batch_size, max_length, name)
    steered = steer(model, pretrained=pretrained, mu=0.0, alpha=alpha, direction=direction)
    rank, size = rank_and_size()
    mine = itertools.islice(found, rank, None, size)
    parts, seen, start = [], 0, time.perf_counter()
    share = None if count is None else len(range(rank, count, size))
    with tqdm(mine, total=share, desc=progress, unit="batch", disable=progress is None or rank > 0) as bar:
        for batch in bar:
            part = token_statistics(steered, batch, alpha, direction)
            parts.append((part, _digests(batch)))
            seen += len(part)
            bar.set_postfix_str(f"{seen} tokens, {seen / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
    return _joined(parts, seen, name)


def _joined(parts: list[tuple[TokenStatistics, bytes]], seen: int, name: str) -> Collected:
    """All processes' parts, batch after batch, then example after example."""
    try:
        expected = int(total(torch.tensor(seen, device=_collective_device())))
        parts = gather(parts)
    except RuntimeError as error:
        raise RuntimeError(f"a process of this run is gone, its share of {name} is lost: {error}") from error
    if expected == 0:
        raise ValueError(f"{name} has no labelled token: it is empty, or all labels are -100")
    tokens = TokenStatistics.concatenate([part for part, _ in parts if len(part)])
    if len(tokens) != expected:
        raise RuntimeError(f"the processes saw {expected} tokens of {name} and passed on {len(tokens)}")
    broken = int((~tokens.moments.isfinite().all(-1)).sum())
    if broken:
        raise ValueError(f"the models' logits are NaN or infinite at {broken} of {expected} gold tokens of {name}")
    numbered = sorted(pair for _, digests in parts for pair in digests)
    digest = hashlib.sha256(b"".join(digest for _, digest in numbered)).hexdigest()
    return Collected(tokens.select(tokens.sequence.argsort(stable=True)), digest)


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


def numbered_batches(
    data: object, tokenizer: object | None, batch_size: int, max_length: int | None = None, name: str = "data"
) -> tuple[Iterator[dict[str, Tensor]], int | None]:
    """Batches with input_ids, labels, perhaps attention_mask, and `sequence`, (B,) each row's index in the data.

    Args:
        data: examples as {"prompt", "completion"}: a list, a Dataset or any iterable, which is read `WINDOW` batches at a time;
            or an iterable of batches. Lengths are not needed.
        tokenizer: needed for texts.
        batch_size: of texts; ready batches keep theirs.
        max_length: longer texts are cut after so many tokens.
        name: what messages call the data.

    Returns:
        The batches and their number, None where it is not known.
    """
    for argument, value in {"batch_size": batch_size, "max_length": max_length}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{argument} must be a positive integer, got {value!r}")
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        kind = type(data).__name__
        raise TypeError(f"{name} must be a list of texts, a Dataset or an iterable of batches, got {kind}")
    length = len(data) if hasattr(data, "__len__") else None
    iterator = iter(data)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{name} is empty")
    rest = itertools.chain([first], iterator)
    if isinstance(first, Mapping) and not set(COLUMNS) & set(first) and hasattr(data, "column_names"):
        raise ValueError(f"{name} needs the columns {' and '.join(COLUMNS)}, got {', '.join(data.column_names)}")
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


def _encoded(
    examples: Iterable[Mapping[str, str]], tokenizer: object, batch_size: int, max_length: int | None
) -> Iterator[dict[str, Tensor]]:
    numbered = enumerate(examples)
    while window := list(itertools.islice(numbered, WINDOW * batch_size)):
        check_examples([example for _, example in window])
        encoded = [(number, encode(example, tokenizer, max_length)) for number, example in window]
        # Neighbours of like length waste little padding; the result does not depend on the order.
        encoded.sort(key=lambda pair: len(pair[1]["input_ids"]))
        for i in range(0, len(encoded), batch_size):
            chunk = encoded[i : i + batch_size]
            batch = collate([row for _, row in chunk], pad_token_id(tokenizer))
            yield {**batch, "sequence": torch.tensor([number for number, _ in chunk])}
