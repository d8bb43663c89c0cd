"""The pre-trained model's side of `mode="lazy"`: tokens that wait, and one forward that catches up on them.

Where the confidence threshold leaves one token and the penalty is -inf, that token has all the mass whatever the pre-trained
model says. Its forward is postponed until a step keeps more: then the row's waiting tokens run in one chunk. Rows of a
batch wait independently. A chunk is as long as the longest wait among the rows that need it, and is written to the place of
its tokens, so that the shorter ones are computed again and not padded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdecode.models.buffered_cache import buffered_cache
from svdecode.models.forward_inputs import CACHE, last_logits, takes_positions
from svdecode.models.reach import frequencies_change, keeps_keys_and_values
from svdecode.models.shared_weights import device_of

ROOM = 64


def _rows_first(function: Callable[[Tensor], Tensor], positions: Tensor) -> Tensor:
    """A function of rows, on positions (B, S) or (axes, B, S)."""
    return function(positions) if positions.dim() == 2 else function(positions.transpose(0, 1)).transpose(0, 1)


class LazyCache:
    """Companion of the adapted model's cache: what the pre-trained model has seen of each row, and what it has not.

    Follows `reorder_cache`, `batch_select_indices`, `batch_repeat_interleave`, `crop` and `reset` as a Cache does.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """An empty one for `model`, of which `why_not` has nothing to say."""
        self.cache = buffered_cache(model, ROOM)
        self.reset()

    @staticmethod
    def why_not(model: PreTrainedModel) -> str | None:
        """What this model lacks for lazy mode, as a state-space model does; None if nothing."""
        if not keeps_keys_and_values(model):
            return "a model whose layers all keep keys and values: use mode='two_pass'"
        if frequencies_change(model):
            return "rotary frequencies that do not depend on the length: waiting tokens would get another one's"
        return None

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self.ids: Tensor | None = None  # (B, S) int64, all tokens so far
        self.positions: Tensor | None = None  # (B, S) or (axes, B, S); None: the model counts them itself
        self.seen: Tensor | None = None  # (B,) how many of them the pre-trained model has seen

    def append(
        self, model: PreTrainedModel, ids: Tensor, positions: Tensor | None, mask: Tensor | None, alone: bool
    ) -> None:
        """Tokens (B, T) that wait from now on.

        Args:
            model: the pre-trained model. It runs at once what waited before, where the new tokens cannot share a chunk with it.
            ids: (B, T) int64.
            positions: (B, T) or (axes, B, T); None where the model is to count them itself.
            mask: (B, S) of all tokens up to these, or None.
            alone: whether these tokens have arguments of their own.
        """
        if self.ids is None:
            self.ids, self.positions = ids, positions
            self.seen = torch.zeros(len(ids), dtype=torch.long)
            return
        past, held = self.ids.shape[1], self.positions
        other_kind = (held is None) != (positions is None) or (held is not None and held.dim() != positions.dim())
        waiting = (self.seen < past).nonzero().squeeze(-1)
        if (alone or other_kind) and len(waiting):
            self.catch_up(model, waiting, None if mask is None else mask[:, :past], 1)
        if (
            other_kind and positions is not None
        ):  # what is in front has been seen: its positions are not asked for again
            held = positions.new_zeros(*positions.shape[:-1], past)
        self.ids = torch.cat([self.ids, ids], 1)
        self.positions = None if positions is None else torch.cat([held, positions], -1)

    def catch_up(
        self, model: PreTrainedModel, rows: Tensor, mask: Tensor | None, last: int, **arguments: object
    ) -> Tensor:
        """Run the waiting tokens of some rows.

        Args:
            model: the pre-trained model.
            rows: (R,) int64, on the CPU.
            mask: (B, S) attention mask of all tokens so far, or None.
            last: how many tokens' logits are wanted.
            arguments: others of the last tokens' forward, for all rows.

        Returns:
            (R, last, V) logits of the last tokens.
        """
        total = self.ids.shape[1]
        start = min(int(self.seen[rows].min()), total - last)
        everything = len(rows) == len(self.ids)
        device = device_of(model)
        chosen = None if everything else rows.to(device)
        for layer in self.cache.layers:
            layer.rows, layer.start, layer.held_rows = chosen, start, len(self.ids)

        def of_rows(values: Tensor) -> Tensor:
            return (values if everything else values[rows.to(values.device)]).to(device)

        extra = dict(arguments)
        if self.positions is not None and takes_positions(model):
            extra["position_ids"] = _rows_first(of_rows, self.positions)[..., start:]
        if mask is not None:
            extra["attention_mask"] = of_rows(mask)[:, :total]
        logits = model(
            input_ids=of_rows(self.ids)[:, start:],
            use_cache=True,
            return_dict=True,
            **{CACHE: self.cache},
            **last_logits(model, last),
            **extra,
        ).logits
        self.seen[rows] = total
        return logits[:, -last:]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues from row beam_idx[i]."""
        self._take(lambda values: values[beam_idx.to(values.device)])

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._take(lambda values: values.repeat_interleave(repeats, 0))

    def _take(self, rows_of: object) -> None:
        if self.ids is None:
            return
        self.ids, self.seen = rows_of(self.ids), rows_of(self.seen)
        if self.positions is not None:
            self.positions = _rows_first(rows_of, self.positions)
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = rows_of(layer.keys), rows_of(layer.values)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, a negative number."""
        if tokens_to_remove and self.ids is not None:
            self.ids = self.ids[:, :tokens_to_remove]
            if self.positions is not None:
                self.positions = self.positions[..., :tokens_to_remove]
            self.seen = self.seen.clamp(max=self.ids.shape[1])

    def activate_past_recording(self) -> None:
        """Nothing to do: all tokens are kept."""
