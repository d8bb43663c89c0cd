"""What the demo measures: held-out NLL, exact match with an interval, and tokens per second."""

from __future__ import annotations

import statistics
import string
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from svdecode.collection import numbered_batches
from svdecode.constants import IGNORE_INDEX
from svdecode.data import pad_token_id
from svdecode.ops import steered_nll
from svdecode.steering import SteeredModel


class Answers(NamedTuple):
    """One model's greedy answers to the test questions."""

    texts: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of exact matches."""
        return sum(self.correct) / len(self.correct)


def normalised(answer: str) -> str:
    """Case, outer punctuation and spaces do not count."""
    return answer.strip().strip(string.punctuation).strip().casefold()


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


@torch.inference_mode()
def answer_all(
    generate: Callable[..., Tensor],
    tokenizer: object,
    examples: list[dict[str, str]],
    *,
    name: str,
    device: torch.device,
    max_new_tokens: int = 12,
    batch_size: int = 16,
    progress: bool = True,
) -> Answers:
    """Greedy answers, one line each, and whether they equal the completion."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["prompt"]))
    texts = [""] * len(examples)
    pad = pad_token_id(tokenizer)
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for chunk in tqdm(chunks, desc=f"answers, {name}", unit="batch", disable=not progress):
        rows = [tokenizer(examples[i]["prompt"]).input_ids for i in chunk]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        tokens = generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens)
        for i, text in zip(chunk, tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True), strict=True):
            texts[i] = next((line.strip() for line in text.splitlines() if line.strip()), "")
    correct = [normalised(t) == normalised(e["completion"]) for t, e in zip(texts, examples, strict=True)]
    return Answers(texts, correct)


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
