"""Greedy answers to a list of questions, and whether they are right."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from svdecode.data.batches import pad_token_id, prompts_batch


class Answers(NamedTuple):
    """One model's greedy answers to the test questions."""

    texts: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of exact matches."""
        return sum(self.correct) / len(self.correct)


def first_line(text: str) -> str:
    """The first line with something in it, without outer spaces; "" where there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def normalised(answer: str) -> str:
    """Case, outer punctuation and spaces do not count."""
    return answer.strip().strip(string.punctuation).strip().casefold()


@torch.inference_mode()
def answer_all(
    generate: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerBase,
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
        ids, mask = prompts_batch(rows, pad, device)
        tokens = generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens)
        for i, text in zip(
            chunk, tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True), strict=True
        ):
            texts[i] = first_line(text)
    correct = [normalised(t) == normalised(e["completion"]) for t, e in zip(texts, examples, strict=True)]
    return Answers(texts, correct)
