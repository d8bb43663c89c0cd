"""What the demo measures: held-out NLL, exact match with an interval, and tokens per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from svdecode.constants import IGNORE_INDEX
from svdecode.data.batches import numbered_batches
from svdecode.models.steer import SteeredModel
from svdecode.ops.steered_nll import steered_nll


@torch.inference_mode()
def nll_of_all_tokens(
    steered: SteeredModel, examples: list[dict[str, str]], tokenizer: object, batch_size: int
) -> dict[str, float]:
    """Mean NLL (nats) of all gold tokens under both models and under the steered one with a penalty of 0."""
    found, _ = numbered_batches(examples, tokenizer, batch_size)
    sums, count = dict.fromkeys(("pre-trained", "warm start", "SVDecode"), 0.0), 0
    for batch in found:
        labels = batch["labels"][:, 1:].to(steered.device)
        inputs = {name: batch[name].to(steered.device) for name in ("input_ids", "attention_mask")}
        pre, ft, _ = steered.pair_logits(**inputs, use_cache=False)
        pre, ft = pre[:, :-1], ft[:, :-1]
        mus = torch.tensor([0.0, steered.mu], device=ft.device)
        both = steered_nll(pre, ft, labels, mus, alpha=steered.alpha, penalty=0.0, direction=steered.direction)
        plain = steered_nll(pre, pre, labels, mus[:1], alpha=1.0, penalty=0.0)
        count += int((labels != IGNORE_INDEX).sum())
        for name, total in zip(sums, (plain[..., 0].sum(), *both.flatten(0, -2).sum(0)), strict=True):
            sums[name] += total.item()
    return {name: total / count for name, total in sums.items()}


def tokens_per_second(
    generators: dict[str, Callable[..., Tensor]], prompt: Tensor, new_tokens: int = 32, rounds: int = 3
) -> dict[str, float]:
    """Median decoding speed of each generator at batch 1, measured in turns so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    for turn in range(rounds + 1):
        for name, generate in generators.items():
            start = time.perf_counter()
            generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: new_tokens / statistics.median(times) for name, times in seconds.items()}
