"""Log-probs of given answers under every system, from one forward of both models; shared prompts are encoded once.

The tokens that all prompts of a run begin with (few-shot examples, an instruction) are encoded once. Each question's own
part follows in a copy of that cache, and the answers in copies of the question's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from svdecode.constants import IGNORE_INDEX
from svdecode.data.batches import collate, padded, with_prompt
from svdecode.evaluation.systems import System, nll_of
from svdecode.models.forward_inputs import CACHE, last_logits, takes_positions

MAX_LOGITS = 2**28
"""Logits of one forward, both models together: 1 GB in float32."""

MAX_STRETCH = 1.5
"""Answers of more different lengths have forwards of their own: padding costs more than another copy of the cache."""


class Alone(nn.Module):
    """A model without an adapter behind the interface of `SteeredModel.pair_logits`: both sides are the same."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def pair_logits(self, **inputs: object) -> tuple[Tensor, Tensor, object]:
        """Logits (B, T, V) twice, and the model's output."""
        output = self.model(**inputs)
        return output.logits, output.logits, output


def common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The tokens that all rows begin with, and at least one less than the shortest, so that each predicts something."""
    first, last = min(rows), max(rows)  # in the order of lists, so that what these two share all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return list(first[: min(shared, min(map(len, rows)) - 1)])


def of_like_length(answers: Sequence[list[int]], size: int) -> list[list[int]]:
    """Indices in groups of at most `size`, the longest of a group at most MAX_STRETCH times as long as its shortest."""
    groups: list[list[int]] = []
    for index in sorted(range(len(answers)), key=lambda i: len(answers[i])):
        fits = groups and len(groups[-1]) < size
        if fits and len(answers[index]) <= MAX_STRETCH * len(answers[groups[-1][0]]):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class Scorer:
    """Scores answers (continuations of prompts) under all systems; both are token ids."""

    def __init__(
        self,
        pair: object,
        systems: list[System],
        *,
        prefix: list[int] = (),
        batch_size: int = 8,
        pad: int = 0,
    ) -> None:
        """Encode what the prompts share.

        Args:
            pair: a steered model, or `Alone`.
            systems: S of them.
            prefix: tokens that all prompts begin with (`common_prefix`); empty: each answer is scored with its whole prompt.
            batch_size: rows a forward.
            pad: any token id.
        """
        self.pair, self.systems, self.batch_size, self.pad = pair, systems, batch_size, pad
        self.prefix = list(prefix)
        self.tokens = 0
        self._cache = self._encoded_prefix() if self.prefix else None

    def score(self, prompt: list[int], answers: list[list[int]]) -> Tensor:
        """(S, A) float32, nats: the total NLL of each answer after one prompt."""
        if self._cache is None:
            return self.score_rows([(prompt, answer) for answer in answers])
        return self._score_shared(prompt, answers)

    @torch.inference_mode()
    def score_rows(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """(S, R) float32, nats: the total NLL of the answer of each (prompt, answer), every row encoded as a whole."""
        vocabulary = self.pair.config.get_text_config().vocab_size
        size = min(self.batch_size, max(1, MAX_LOGITS // (2 * self._span(rows) * vocabulary)))
        parts = [self._score_batch(rows[i : i + size]) for i in range(0, len(rows), size)]
        return torch.cat(parts, 1)

    def _score_batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        encoded = [with_prompt(p, a) for p, a in rows]
        batch = {name: value.to(self.pair.device) for name, value in collate(encoded, self.pad).items()}
        span = self._span(rows)
        labels = batch.pop("labels")[:, 1 - span :]
        pre, ft = (logits[:, -span:-1] for logits in self._forward(**batch, use_cache=False, keep=span))
        wanted = labels != IGNORE_INDEX
        nll = nll_of(self.systems, pre[wanted], ft[wanted], labels[wanted])
        row = wanted.nonzero()[:, 0]
        return nll.new_zeros(len(nll), len(rows)).index_add_(1, row, nll)

    @staticmethod
    def _span(rows: Sequence[tuple[list[int], list[int]]]) -> int:
        """Positions at the end of a batch that need logits: from where the first answer is predicted."""
        return max(len(p) + len(a) for p, a in rows) - min(len(p) for p, _ in rows) + 1

    @torch.inference_mode()
    def _encoded_prefix(self) -> Cache:
        cache = DynamicCache(config=self.pair.config.get_text_config(decoder=True))
        self._extend(cache, self.prefix)
        return cache

    @torch.inference_mode()
    def _score_shared(self, prompt: list[int], answers: list[list[int]]) -> Tensor:
        cache = copy.deepcopy(self._cache)
        pre, ft = self._extend(cache, prompt[len(self.prefix) :])
        last = pre[:, -1:], ft[:, -1:]  # (1, 1, V): they predict every answer's first token
        found = pre.new_empty((len(self.systems), len(answers)), dtype=torch.float32)
        groups = of_like_length(answers, self.batch_size)
        for number, group in enumerate(groups, 1):
            own = cache if number == len(groups) else copy.deepcopy(cache)
            found[:, group] = self._score_answers(own, last, [answers[i] for i in group], len(prompt))
        return found

    def _score_answers(self, cache: Cache, last: tuple[Tensor, Tensor], answers: list[list[int]], past: int) -> Tensor:
        labels = padded(answers, IGNORE_INDEX).to(self.pair.device)  # (A, T)
        rows, length = labels.shape
        nll = nll_of(self.systems, *(logits.expand(rows, 1, -1) for logits in last), labels[:, :1])
        if length > 1:
            cache.batch_repeat_interleave(rows)
            held = (labels != IGNORE_INDEX).long()[:, :-1]
            mask = torch.cat([held.new_ones(rows, past), held], 1)
            ids = padded(answers, self.pad).to(labels)[:, :-1]
            positions = torch.arange(past, past + length - 1, device=ids.device)[None]
            pre, ft = self._forward(
                input_ids=ids,
                attention_mask=mask,
                **{CACHE: cache},
                use_cache=True,
                position_ids=positions,
            )
            nll = torch.cat([nll, nll_of(self.systems, pre, ft, labels[:, 1:])], -1)
        return nll.sum(-1)

    def _extend(self, cache: Cache, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Put one row's tokens into the cache; logits (1, T or 1, V) of both models, the last position's at the end."""
        past = int(cache.get_seq_length())
        ids = torch.tensor([tokens], device=self.pair.device)
        positions = torch.arange(past, past + len(tokens), device=ids.device)[None]
        return self._forward(
            input_ids=ids,
            attention_mask=ids.new_ones(1, past + len(tokens)),
            **{CACHE: cache},
            use_cache=True,
            position_ids=positions,
            keep=1,
        )

    def _forward(self, *, keep: int | None = None, **inputs: object) -> tuple[Tensor, Tensor]:
        """Logits of both models, of the last `keep` positions at least. Arguments that the model does not know are left out."""
        self.tokens += inputs["input_ids"].numel()
        model = self.pair.model if isinstance(self.pair, Alone) else self.pair
        if keep is not None:
            inputs |= last_logits(model, keep)
        if not takes_positions(model):
            inputs.pop("position_ids", None)
        pre, ft, _ = self.pair.pair_logits(**inputs)
        return pre, ft
