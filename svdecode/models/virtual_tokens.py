"""Prompt learning: virtual tokens in front of the adapted rows, masked slots in front of the pre-trained ones.

Prompt tuning and P-tuning put embeddings there, prefix tuning keys and values. Both models then share one forward of doubled
rows: a masked slot is attended to by nobody, and positions are counted for each row. peft's own forward drops the positions
of left-padded prompts and cannot take a second step with its cache; here both work.
"""

from __future__ import annotations

import torch
from peft import PeftModel, PeftType
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from svdecode.models.forward_inputs import CACHE
from svdecode.models.reach import window_of
from svdecode.models.shared_weights import share_weights

AS_EMBEDDINGS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.CPT)
AS_KEYS_AND_VALUES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


class VirtualTokens:
    """The virtual tokens of a PeftModel's active adapter."""

    def __init__(self, model: PeftModel) -> None:
        """Share the prompt encoder's weights; switching the adapter of `model` later has no effect here."""
        self.peft = share_weights(model).eval()
        self.count: int = model.active_peft_config.num_virtual_tokens
        self.window = window_of(model.get_base_model())
        self.as_embeddings = model.active_peft_config.peft_type in AS_EMBEDDINGS

    def put_in_front(
        self, inputs: dict[str, object], model: PreTrainedModel, masked_rows: int, takes_positions: bool
    ) -> None:
        """Change the inputs of a forward so that it sees the virtual tokens.

        Args:
            inputs: arguments of the forward, rows [masked_rows without virtual tokens | the others with]; input_ids or
                inputs_embeds (R, T, ...), attention_mask (R, past + T) or None, position_ids or None, the cache.
            model: whose embeddings turn input_ids into inputs_embeds.
            masked_rows: the first rows get masked slots.
            takes_positions: whether the model's forward has position_ids.
        """
        rows = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        count, length, device, n = rows.shape[0], rows.shape[1], rows.device, self.count
        cache = inputs.get(CACHE)
        past = 0 if cache is None else int(cache.get_seq_length())
        held = cache is not None and hasattr(cache, "inside_forward") and int(cache.real_length()) >= n
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones(count, past + length, dtype=torch.long, device=device)
        order = self._order(mask, masked_rows, past if held else None)
        slots = mask.new_ones(count, n)
        slots[:masked_rows] = 0
        inputs["attention_mask"] = _ordered(torch.cat([slots, mask], 1), order)
        if takes_positions:
            positions = inputs.get("position_ids")
            if positions is None:
                positions = torch.arange(past, past + length, device=device)[None]
            positions = positions.expand(*positions.shape[:-2], count, -1).clone()
            positions[..., masked_rows:, :] += n
            inputs["position_ids"] = positions
        if held:
            return
        if not self.as_embeddings:
            inputs[CACHE] = self._fill(cache, count, model)
            return
        order = None if order is None else order[:, : n + length]  # a static cache's mask goes on behind the tokens
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        prompts = self.peft.get_prompt(count - masked_rows).to(embeds)
        nothing = prompts.new_zeros(masked_rows, *prompts.shape[1:])
        embeds = torch.cat([torch.cat([nothing, prompts]), embeds], 1)
        inputs["inputs_embeds"] = embeds if order is None else embeds.gather(1, order[..., None].expand(embeds.shape))
        if takes_positions:
            steps = torch.arange(n, device=device).expand(count, n) * slots
            positions = inputs["position_ids"]
            steps = steps.expand(*positions.shape[:-1], n)
            inputs["position_ids"] = _ordered(torch.cat([steps, positions], -1), order)
        if isinstance(inputs.get("token_type_ids"), Tensor):
            types = inputs["token_type_ids"]
            inputs["token_type_ids"] = _ordered(torch.cat([types.new_zeros(count, n), types], 1), order)

    def _order(self, mask: Tensor, masked_rows: int, past: int | None) -> Tensor | None:
        """Where the slots and tokens of each row (R, n + S) stand; None for slots in front of everything.

        Padding between virtual tokens and prompt would push them out of a window, or pass through a state. Where layers have
        one, it stays in front of the virtual tokens. `past` is how many tokens the cache holds, None for a first forward.
        """
        padding = mask[masked_rows:].long().argmax(-1)
        if self.window is None or int(padding.max()) == 0:
            return None
        if not self.as_embeddings and mask.shape[1] + self.count > self.window:
            raise ValueError(
                f"attention_mask has padding, and {mask.shape[1] + self.count} tokens are more than the model's window of "
                f"{self.window}: a prefix then needs rows of equal length, or one at a time"
            )
        if not self.as_embeddings:
            return None
        if not mask[masked_rows:].any(-1).all() or (past is not None and past < int(padding.max())):
            raise ValueError(
                "attention_mask is 0 for all tokens so far of a row: virtual tokens in a model with a window or a state need "
                "a whole prompt at once (no prefill_chunk_size, no crop into the padding)"
            )
        first = torch.cat([padding.new_zeros(masked_rows), padding])[:, None]
        at, n = torch.arange(self.count + mask.shape[1], device=mask.device).expand(len(mask), -1), self.count
        return torch.where(at < first, at + n, torch.where(at < first + n, at - first, at))

    def _fill(self, cache: Cache | None, rows: int, model: PreTrainedModel) -> Cache:
        """The trained prefix in an empty cache; masked rows hold it too, which is as good as anything there."""
        prefix = self.peft.get_prompt(rows)
        if cache is None:
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        for index, layer in enumerate(prefix.layers):
            # Layers that share another layer's keys are left out by peft, or store nothing in the model's own cache.
            stores = index >= len(cache.layers) or isinstance(cache.layers[index], CacheLayerMixin)
            if layer.get_seq_length() > 0 and stores:
                cache.update(layer.keys, layer.values, index)
        return cache


def _ordered(values: Tensor, order: Tensor | None) -> Tensor:
    """Values (R, S) or (axes, R, S) with each row in its order (R, S)."""
    return values if order is None else values.gather(-1, order.expand(values.shape))
