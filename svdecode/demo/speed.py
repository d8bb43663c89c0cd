"""Tokens per second of three systems, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor

from svdecode.decoding.generate import generate
from svdecode.models.adapters import pretrained_of
from svdecode.models.steered_model import SteeredModel

NEW_TOKENS, ROUNDS = 32, 3


def tokens_per_second(model: PeftModel, steered: SteeredModel, prompt: Tensor) -> dict[str, float]:
    """Median greedy decoding speed at batch 1 of pre-trained model, warm start and SVDecode.

    All three write `NEW_TOKENS` tokens, whatever they are, and take turns, so that they meet the same machine. A round
    before the `ROUNDS` that count warms up.

    Args:
        model: the warm start.
        steered: what `svdecode.steer` made of it.
        prompt: (1, T) int64.
    """
    mask = torch.ones_like(prompt)
    forced = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    pretrained = pretrained_of(model.get_base_model())
    systems: dict[str, Callable[[], Tensor]] = {
        "pre-trained": lambda: pretrained.generate(input_ids=prompt, attention_mask=mask, **forced),
        "warm start": lambda: model.generate(input_ids=prompt, attention_mask=mask, **forced),
        "SVDecode": lambda: generate(steered, prompt, mask, max_new_tokens=NEW_TOKENS, eos_token_id=[]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(ROUNDS + 1):
        for name, decode in systems.items():
            start = time.perf_counter()
            decode()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: NEW_TOKENS / statistics.median(times) for name, times in seconds.items()}
