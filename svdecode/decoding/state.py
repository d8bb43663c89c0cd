"""What the thin loop and its beams hold: tokens, masks, positions and one cache, all allocated before the first step."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from svdecode.models.buffered_cache import buffered_cache
from svdecode.models.forward_inputs import CACHE, last_logits, positions_of, takes_positions
from svdecode.models.reach import frequencies_change_at, keeps_keys_and_values, keeps_some_keys, needs_dynamic_cache
from svdecode.models.steered_model import SteeredModel


class DecodingState:
    """Prompts that grow.

    tokens: (R, T + new) int64, filled with the pad token behind what is there.
    end: how many of them are there.
    """

    def __init__(
        self, steered: SteeredModel, input_ids: Tensor, attention_mask: Tensor | None, new: int, pad: int
    ) -> None:
        """Prompts (R, T), left-padded, and room for `new` tokens."""
        rows, prompt = input_ids.shape
        self.steered = steered
        self.end, self._start = prompt, 0
        self.tokens = torch.full((rows, prompt + new), pad, dtype=torch.long, device=input_ids.device)
        self.tokens[:, :prompt] = input_ids
        self._mask = torch.ones_like(self.tokens)
        if attention_mask is not None:
            self._mask[:, :prompt] = attention_mask
        self._positions = positions_of(self._mask)
        self._only_states = not keeps_some_keys(steered)
        self._room, self._change = prompt + new, frequencies_change_at(steered)
        self._cache = _empty_cache(steered, self._room)

    def next_logits(self) -> tuple[Tensor, Tensor]:
        """(R, V) logits of both models for the token at `end`."""
        longest = 0 if self._change is None else int(self._positions[:, : self.end].max()) + 1
        if (
            self._change is not None and longest > self._change
        ):  # keys so far have other frequencies: once, all run again
            self._cache, self._start, self._change = _empty_cache(self.steered, self._room), 0, None
        extra = last_logits(self.steered, 1)
        if takes_positions(self.steered):
            extra["position_ids"] = self._positions[:, self._start : self.end]
        if self._only_states:  # which take the mask of the new tokens alone
            extra["attention_mask"] = self._mask[:, self._start : self.end]
        # The mask of a static cache has all slots at every step: one shape, one CUDA graph.
        shown = self._mask if isinstance(self._cache, StaticCache) else self._mask[:, : self.end]
        pre, ft, _ = self.steered.logits_to_steer(
            input_ids=self.tokens[:, self._start : self.end],
            use_cache=True,
            **{"attention_mask": shown, CACHE: self._cache, **extra},
        )
        return pre[:, -1], ft[:, -1]

    def append(self, tokens: Tensor) -> None:
        """One token (R,) for each row."""
        self.tokens[:, self.end] = tokens
        self._start, self.end = self.end, self.end + 1

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row rows[i]; there may be more rows than before, as beams of one prompt."""
        self._cache.reorder_cache(rows)
        self.tokens, self._mask, self._positions = (v[rows] for v in (self.tokens, self._mask, self._positions))


def _empty_cache(steered: SteeredModel, room: int) -> Cache:
    config = steered.config.get_text_config(decoder=True)
    virtual = 0 if steered._virtual_tokens is None else steered._virtual_tokens.count
    if not keeps_keys_and_values(steered):  # the mask of a static cache is no mask for a state
        return DynamicCache(config=config)
    if _prefers_static(steered) and not needs_dynamic_cache(steered, steered._virtual_tokens is not None):
        return StaticCache(config=config, max_cache_len=room + virtual)
    return buffered_cache(steered, room + virtual)


def _prefers_static(steered: SteeredModel) -> bool:
    """Whether a graph can keep a cache that has one shape at all steps."""
    return steered.device.type == "cuda" and steered.mode != "lazy"
