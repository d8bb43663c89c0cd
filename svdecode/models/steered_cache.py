"""Key-value caches that hold both models and follow `generate()` when it reorders, selects, repeats or crops rows.

generate() makes the cache, of whatever kind it was asked for; its class is extended in place. One cache may hold the rows of
both models, [pre-trained | adapted], or only the adapted model's and pass everything on to companions, one for each other
model. A prompt-learning adapter's virtual tokens stand in front of the prompt; generate() must not count them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel


class SteeredCache:
    """What `extend` adds to the class of a cache."""

    paired: bool
    """Whether rows are [pre-trained | adapted]."""
    companions: list
    """The other models' caches, which what happens to this one happens to."""
    virtual_tokens: int
    """Slots in front of the prompt that generate() is not told of."""
    owner: weakref.ref
    """The steered model that it is of."""
    own_prompt: bool
    """Whether the pre-trained model has a prompt of its own."""
    one_mask: bool
    """Whether one attention mask serves all rows of both models, so that generate() may prepare it."""

    batch: int | None = None
    """Rows of each model, once a forward has filled the cache; quantised layers and states do not tell."""

    _inside_forward = False

    @contextlib.contextmanager
    def inside_forward(self) -> Iterator[None]:
        """Count all slots, as attention masks and positions must."""
        self._inside_forward = True
        try:
            yield
        finally:
            self._inside_forward = False

    def real_length(self) -> int:
        """Slots held, with the virtual tokens."""
        return super().get_seq_length()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held, without the virtual ones while generate() asks."""
        length = super().get_seq_length(layer_idx)
        if self._inside_forward or not self.virtual_tokens:
            return length
        return max(length - self.virtual_tokens, 0)

    @property
    def is_compileable(self) -> bool:
        """generate() makes the 4-d mask of such caches itself."""
        return super().is_compileable and self.one_mask

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues from row beam_idx[i], for both models."""
        super().reorder_cache(self._rows_of_both(beam_idx))
        self._now_has(len(beam_idx))
        for companion in self.companions:
            companion.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of both models."""
        super().batch_select_indices(self._rows_of_both(indices))
        self._now_has(len(indices))
        for companion in self.companions:
            companion.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the rows of both models."""
        super().batch_repeat_interleave(repeats)  # [0, 1 | 0, 1] gives [0, 0, 1, 1 | 0, 0, 1, 1]
        self._now_has((self.batch or 0) * repeats)
        for companion in self.companions:
            companion.batch_repeat_interleave(repeats)

    def crop(self, *arguments: int) -> None:
        """Drop tokens of both models."""
        super().crop(*arguments)
        for companion in self.companions:
            companion.crop(*arguments)

    def activate_past_recording(self) -> None:
        """Keep what a later `crop` may bring back, for both models."""
        super().activate_past_recording()
        for companion in self.companions:
            companion.activate_past_recording()

    def reset(self) -> None:
        """Empty the caches of both models."""
        super().reset()
        for companion in self.companions:
            companion.reset()

    def _rows_of_both(self, indices: Tensor) -> Tensor:
        if not self.paired:
            return indices
        return torch.cat([indices, indices + (self.batch or 0)])

    def _now_has(self, batch: int) -> None:
        if self.batch is not None:
            self.batch = batch


@functools.cache
def _extended(kind: type) -> type:
    return type(f"Steered{kind.__name__}", (SteeredCache, kind), {})


def length_of(cache: Cache) -> int:
    """Tokens that a cache holds; 1 for any number of them where all layers keep a state, which does not tell."""
    linear = getattr(cache, "is_linear", ())
    if len(linear) and all(linear):
        return int(cache.has_previous_state())
    return int(cache.get_seq_length())


def check_empty(cache: Cache) -> None:
    """ValueError for a cache that another model has filled."""
    if length_of(cache) > 0:
        raise ValueError(
            "the cache holds tokens of one model only, or of another steered one: start from an empty cache"
        )


def extend(cache: Cache, **attributes: object) -> Cache:
    """Make an empty cache follow both models; the arguments are the attributes of `SteeredCache`."""
    if not isinstance(cache, SteeredCache):
        cache.__class__ = _extended(type(cache))
    cache.__dict__.update(attributes)
    return cache


def companion_of(cache: Cache, model: PreTrainedModel, same_layers: bool) -> Cache:
    """An empty cache for another model; of the kind of an empty `cache`, if the layers are the same."""
    if same_layers:
        # An offloaded cache has a stream to fetch with, which cannot be copied and may serve both.
        streams = {id(value): value for value in vars(cache).values() if isinstance(value, torch.Stream)}
        companion = copy.deepcopy(cache, streams)
        if isinstance(companion, SteeredCache):  # extended before it was emptied
            companion.__class__ = type(companion).__bases__[1]
        return companion
    return DynamicCache(config=model.config.get_text_config(decoder=True))
