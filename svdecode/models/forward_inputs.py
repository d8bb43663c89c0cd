"""What goes into a forward of two models, and what comes out: rows of both, positions, prompts of their own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
"""The names of a model's cache in transformers, as an argument of `forward` and in its output: since 5.24, and before."""

CACHE = next(name for name in CACHE_NAMES if name in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)})
"""The name in the installed version."""

OWN_ARGUMENTS = ("pretrained_input_ids", "pretrained_attention_mask")


@functools.cache
def _parameters(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward has an argument: models with ALiBi have no position_ids, some no logits_to_keep."""
    forward = getattr(type(model), "forward", None) or getattr(model, "forward", None)
    return forward is not None and argument in _parameters(forward)


def with_cache_name(keywords: dict[str, object]) -> dict[str, object]:
    """Arguments of a forward or of `generate()`, in which the cache may have either name, with the name `CACHE`."""
    return {CACHE if name in CACHE_NAMES else name: value for name, value in keywords.items()}


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's forward has position_ids."""
    return takes(model, "position_ids")


def last_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """Arguments that ask a model for the logits of its last `count` tokens alone; none where it always makes all of them."""
    return {"logits_to_keep": count} if takes(model, "logits_to_keep") else {}


def positions_of(mask: Tensor) -> Tensor:
    """Positions that count what an attention mask (B, S) shows; 0 on padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def text_positions(positions: Tensor) -> Tensor:
    """(B, T) of positions that may have several axes, (axes, B, T): a model with images counts time, height and width."""
    return positions if positions.dim() == 2 else positions[0]


def rows_of(inputs: dict[str, object]) -> Tensor:
    """The input_ids (B, T) or inputs_embeds (B, T, H) of a forward."""
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]


def trim(output: object, batch: int, length: int) -> None:
    """Drop virtual tokens; of what only the adapted model is asked for, drop the first `batch` rows."""
    output["logits"] = output["logits"][:, -length:]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(layer[batch:, -length:] for layer in output["hidden_states"])
    if output.get("attentions") is not None:
        output["attentions"] = tuple(layer[batch:, :, -length:] for layer in output["attentions"])


def combined(ft: Tensor, others: list[Tensor]) -> Tensor:
    """The logits that steering pushes away from: the pre-trained ones, or adapted - (expert - anti-expert)."""
    return others[0] if len(others) == 1 else ft.float() - (others[0].float() - others[1].float())


def with_own_prompt(
    inputs: dict[str, object],
    takes_positions: bool,
    pretrained_input_ids: Tensor,
    pretrained_attention_mask: Tensor | None,
) -> dict[str, object]:
    """The inputs of a forward for the pre-trained model, which has a prompt of its own and the same continuation.

    `inputs`, the adapted model's, get an attention mask and positions if they had none, since both sides need them then
    (generate() drops a mask that hides nothing). ValueError for inputs_embeds, or a mask of another shape than the prompt's.
    """
    if inputs.get("input_ids") is None:
        raise ValueError("pretrained_input_ids need input_ids: inputs_embeds have no tokens to go on with")
    if pretrained_attention_mask is not None and pretrained_attention_mask.shape != pretrained_input_ids.shape:
        raise ValueError(
            f"pretrained_attention_mask must have the shape of pretrained_input_ids, {tuple(pretrained_input_ids.shape)}, "
            f"got {tuple(pretrained_attention_mask.shape)}"
        )
    ids, cache, prompt = inputs["input_ids"], inputs.get(CACHE), pretrained_input_ids
    past = 0 if cache is None else int(cache.get_seq_length())
    own = max(prompt.shape[1] - past, 0)
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = inputs["attention_mask"] = ids.new_ones(ids.shape[0], past + ids.shape[1])
    prompt_mask = (
        mask.new_ones(prompt.shape) if pretrained_attention_mask is None else pretrained_attention_mask.to(mask)
    )
    mask = torch.cat([prompt_mask[:, : mask.shape[1]], mask[:, prompt.shape[1] :]], 1)
    found = {
        **inputs,
        "input_ids": torch.cat([prompt[:, past : past + ids.shape[1]], ids[:, own:]], 1),
        "attention_mask": mask,
    }
    if takes_positions:
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)
        positions = positions_of(mask)
        found["position_ids"] = positions[:, past : past + ids.shape[1]]
    return found
