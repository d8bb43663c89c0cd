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
from svdecode.models.shared_weights import share_weights

AS_EMBEDDINGS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.CPT)
AS_KEYS_AND_VALUES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


class VirtualTokens:
    """The virtual tokens of a PeftModel's active adapter."""

    def __init__(self, model: PeftModel) -> None:
        """Share the prompt encoder's weights; switching the adapter of `model` later has no effect here."""
        self.peft = share_weights(model).eval()
        self.count: int = model.active_peft_config.num_virtual_tokens
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
        slots = mask.new_ones(count, n)
        slots[:masked_rows] = 0
        inputs["attention_mask"] = torch.cat([slots, mask], 1)
        if takes_positions:
            positions = inputs.get("position_ids")
            if positions is None:
                positions = torch.arange(past, past + length, device=device)[None]
            positions = positions.expand(count, -1).clone()
            positions[masked_rows:] += n
            inputs["position_ids"] = positions
        _check_window(model, inputs["attention_mask"], masked_rows, n)
        if held:
            return
        if not self.as_embeddings:
            inputs[CACHE] = self._fill(cache, count, model)
            return
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        prompts = self.peft.get_prompt(count - masked_rows).to(embeds)
        nothing = prompts.new_zeros(masked_rows, *prompts.shape[1:])
        inputs["inputs_embeds"] = torch.cat([torch.cat([nothing, prompts]), embeds], 1)
        if takes_positions:
            steps = torch.arange(n, device=device).expand(count, n) * slots
            inputs["position_ids"] = torch.cat([steps, inputs["position_ids"]], 1)
        if isinstance(inputs.get("token_type_ids"), Tensor):
            types = inputs["token_type_ids"]
            inputs["token_type_ids"] = torch.cat([types.new_zeros(count, n), types], 1)

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


def _check_window(model: PreTrainedModel, mask: Tensor, masked_rows: int, virtual: int) -> None:
    """ValueError where padding between virtual tokens and prompt would push them out of a sliding window."""
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    if window and mask.shape[1] > window and not mask[masked_rows:, virtual:].all():
        raise ValueError(
            f"attention_mask has padding, and {mask.shape[1]} tokens are more than the model's window of {window}: "
            "virtual tokens then need rows of equal length, or one at a time"
        )
