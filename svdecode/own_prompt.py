"""A prompt of its own for the pre-trained model, as classifier-free guidance has it."""

from __future__ import annotations

import torch
from torch import Tensor

OWN_ARGUMENTS = ("pretrained_input_ids", "pretrained_attention_mask")


def with_own_prompt(
    inputs: dict[str, object], pretrained_input_ids: Tensor, pretrained_attention_mask: Tensor | None
) -> dict[str, object]:
    """The inputs of a forward for the pre-trained model, which has a prompt of its own and the same continuation.

    `inputs`, the adapted model's, get an attention mask if they had none (generate() drops one that hides nothing).
    """
    ids, cache, prompt = inputs["input_ids"], inputs.get("past_key_values"), pretrained_input_ids
    past = 0 if cache is None else int(cache.get_seq_length())
    own = max(prompt.shape[1] - past, 0)
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = inputs["attention_mask"] = ids.new_ones(ids.shape[0], past + ids.shape[1])
    prompt_mask = (
        mask.new_ones(prompt.shape) if pretrained_attention_mask is None else pretrained_attention_mask.to(mask)
    )
    mask = torch.cat([prompt_mask[:, : mask.shape[1]], mask[:, prompt.shape[1] :]], 1)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {
        **inputs,
        "input_ids": torch.cat([prompt[:, past : past + ids.shape[1]], ids[:, own:]], 1),
        "attention_mask": mask,
        "position_ids": positions[:, past : past + ids.shape[1]],
    }
