"""Keys and values in buffers that are allocated once, where transformers' dynamic cache copies all of them at every step."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class BufferedLayer(DynamicLayer):
    """Keys and values (B, heads, room, size). A forward reads and writes `rows` of them, from token `start` on.

    Sliding layers keep everything too: their mask hides what is outside the window.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.start = 0
        self.rows: Tensor | None = None  # (R,) of the B rows; None: all
        self.held_rows: int | None = None  # B, if it is not the first forward's

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the others of their rows; returns the rows' keys and values up to there."""
        end = self.start + key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.room = max(self.room, end)
            self.keys, self.values = self._buffer(key_states, None), self._buffer(value_states, None)
        elif end > self.keys.shape[-2]:
            self.room = 3 * end // 2
            self.keys, self.values = self._buffer(key_states, self.keys), self._buffer(value_states, self.values)
        rows = slice(None) if self.rows is None else self.rows
        self.keys[rows, :, self.start : end] = key_states
        self.values[rows, :, self.start : end] = value_states
        self.start = end
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    def _buffer(self, like: Tensor, held: Tensor | None) -> Tensor:
        rows = len(like) if self.held_rows is None else self.held_rows
        buffer = like.new_zeros(rows if held is None else len(held), like.shape[1], self.room, like.shape[3])
        if held is not None:
            buffer[:, :, : held.shape[-2]] = held
        return buffer

    def get_seq_length(self) -> int:
        """Tokens in front of the next ones."""
        return self.start

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, a negative number; their place is written again."""
        self.start += tokens_to_remove

    def reset(self) -> None:
        """Forget everything and give the buffers back."""
        self.keys = self.values = None
        self.is_initialized, self.start = False, 0


def buffered_cache(model: PreTrainedModel, room: int) -> Cache:
    """An empty cache with room for so many tokens per row; more makes it grow."""
    config = model.config.get_text_config(decoder=True)
    count = len(DynamicCache(config=config).layers) or config.num_hidden_layers
    return Cache(layers=[BufferedLayer(room) for _ in range(count)])
