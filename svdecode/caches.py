"""Key-value caches that hold both models' rows and follow `generate()` when it reorders, selects or crops them.

generate() makes the cache, of whatever kind it was asked for; its class is extended in place.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache


class PairedRows:
    """A cache of 2B rows, [pre-trained | adapted], that is told of B."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues from row beam_idx[i], in both halves."""
        super().reorder_cache(self._both_halves(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of both halves."""
        super().batch_select_indices(self._both_halves(indices))

    def _both_halves(self, indices: Tensor) -> Tensor:
        half = next(layer.keys.shape[0] for layer in self.layers if getattr(layer, "keys", None) is not None) // 2
        return torch.cat([indices, indices + half])


class WithCompanion:
    """The adapted model's cache, which passes what happens to it on to the pre-trained model's."""

    companion: Cache

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder both caches."""
        super().reorder_cache(beam_idx)
        self.companion.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of both caches."""
        super().batch_select_indices(indices)
        self.companion.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the rows of both caches."""
        super().batch_repeat_interleave(repeats)
        self.companion.batch_repeat_interleave(repeats)

    def crop(self, *arguments: int) -> None:
        """Drop tokens from both caches."""
        super().crop(*arguments)
        self.companion.crop(*arguments)

    def reset(self) -> None:
        """Empty both caches."""
        super().reset()
        self.companion.reset()


@functools.cache
def _extended(behaviour: type, kind: type) -> type:
    return type(f"{behaviour.__name__}{kind.__name__}", (behaviour, kind), {})


def _check_empty(cache: Cache) -> None:
    if cache.get_seq_length() > 0:
        raise ValueError(
            "past_key_values holds tokens of one model only: start from an empty cache, or from a steered one"
        )


def pair_rows(cache: Cache) -> Cache:
    """Make an empty cache, or one that a doubled forward has filled, follow both halves of the rows."""
    if not isinstance(cache, PairedRows):
        cache.__class__ = _extended(PairedRows, type(cache))
    return cache


def with_companion(cache: Cache, pretrained: PreTrainedModel, same_layers: bool) -> Cache:
    """Give an empty cache a companion of its kind for the pre-trained model."""
    if isinstance(cache, WithCompanion):
        return cache
    _check_empty(cache)
    config = pretrained.config.get_text_config(decoder=True)
    if same_layers:
        companion = copy.deepcopy(cache)
    elif isinstance(cache, StaticCache):
        companion = StaticCache(config=config, max_cache_len=cache.get_max_length())
    else:
        companion = DynamicCache(config=config)
    cache.__class__ = _extended(WithCompanion, type(cache))
    cache.companion = companion
    return cache
