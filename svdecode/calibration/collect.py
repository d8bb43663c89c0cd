"""Token statistics of a whole data set: a stream of batches, shared by all processes, in bounded memory.

Texts are read a window of batches at a time (`data/batches.py`). Only the statistics of a batch are kept
(`strength/token_statistics.py` states their size). The data need no length.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdecode.calibration.statistics import token_statistics
from svdecode.common.distributed import gather, rank_and_size, total
from svdecode.constants import ALPHA, KL, Direction
from svdecode.data.batches import numbered_batches
from svdecode.models.steer import steer
from svdecode.ops import validation
from svdecode.strength.token_statistics import TokenStatistics


class Collected(NamedTuple):
    """The statistics of a data set, ordered as the data are."""

    tokens: TokenStatistics
    sha256: str
    """Of the token ids and labels of each sequence, in order; independent of batch size, padding and processes."""
    sequences: list[bytes]
    """SHA-256 of each sequence, in order."""


def collect_tokens(
    model: PeftModel | PreTrainedModel,
    data: object,
    *,
    pretrained: PreTrainedModel | tuple[PreTrainedModel, PreTrainedModel] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    alpha: float = ALPHA,
    direction: Direction = KL,
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
    model: PeftModel | PreTrainedModel,
    data: object,
    *,
    pretrained: PreTrainedModel | tuple[PreTrainedModel, PreTrainedModel] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    alpha: float,
    direction: Direction,
    batch_size: int,
    max_length: int | None = None,
    progress: str | None = None,
    name: str = "data",
) -> Collected:
    """As `collect_tokens`, with the data's hash. Processes started by a launcher share the batches and all get the whole.

    Every process passes the same data. Batches are the same as in one process, so the result is the same to the last bit on
    the same kind of machine.
    """
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
    return _joined(parts, seen, name, max_length)


def _joined(parts: list[tuple[TokenStatistics, bytes]], seen: int, name: str, max_length: int | None) -> Collected:
    """All processes' parts, batch after batch, then example after example."""
    try:
        expected = int(total(torch.tensor(seen, device=_collective_device())))
        parts = gather(parts)
    except RuntimeError as error:
        raise RuntimeError(f"a process of this run is gone, its share of {name} is lost: {error}") from error
    if expected == 0 and max_length is not None and any(digests for _, digests in parts):
        raise ValueError(
            f"no example of {name} has a token of its completion within max_length={max_length}: use a larger max_length"
        )
    if expected == 0:
        raise ValueError(f"{name} has no labelled token: it is empty, or all labels are -100")
    tokens = TokenStatistics.concatenate([part for part, _ in parts if len(part)])
    if len(tokens) != expected:
        raise RuntimeError(f"the processes saw {expected} tokens of {name} and passed on {len(tokens)}")
    broken = int((~tokens.moments.isfinite().all(-1)).sum())
    if broken:
        raise ValueError(f"the models' logits are NaN or infinite at {broken} of {expected} gold tokens of {name}")
    numbered = sorted(pair for _, digests in parts for pair in digests)
    names = [digest for _, digest in numbered]
    digest = hashlib.sha256(b"".join(names)).hexdigest()
    return Collected(tokens.select(tokens.sequence.argsort(stable=True)), digest, names)


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
