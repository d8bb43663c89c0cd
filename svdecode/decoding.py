"""The thin decoding loop: the paper's Algorithm 1 over `steer_sample`, which never writes a (B, V) distribution."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import DynamicCache

from svdecode import validation
from svdecode.ops import steer_sample
from svdecode.steered_model import SteeredModel


@torch.inference_mode()
def generate(
    steered: SteeredModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    eos_token_id: int | list[int] | None = None,
    generator: torch.Generator | None = None,
    streamer: object | None = None,
) -> Tensor:
    """Decode from the steered distribution.

    Args:
        steered: what `svdecode.steer` returns.
        input_ids: (B, T) int64 prompts, left-padded where their lengths differ.
        attention_mask: (B, T), 0 on padding; None for none.
        max_new_tokens: at most so many tokens are added.
        temperature: 0 is greedy; otherwise divides the steered log-probs.
        top_k: sample among the k most probable tokens.
        top_p: sample among the most probable tokens with a mass of top_p.
        num_beams: more than 1 hands over to the model's own `generate()`; greedy beams only.
        eos_token_id: ends a row; None takes the model's generation config.
        generator: source of randomness on the model's device.
        streamer: gets the prompt, then each step's tokens (`put`), then `end()`; as in transformers.

    Returns:
        (B, T + new) int64: prompt first, rows that ended are padded.
    """
    if not isinstance(steered, SteeredModel):
        raise TypeError(f"steered must come from svdecode.steer, got {type(steered).__name__}")
    _check(input_ids, attention_mask, max_new_tokens, num_beams)
    validation.check_sampling(temperature, top_k, top_p)
    config = steered.generation_config
    ends = config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = next((token for token in (config.pad_token_id, *ends) if token is not None), 0)
    if num_beams > 1:
        if temperature > 0:
            raise ValueError("num_beams above 1 needs temperature=0 here: use steered.generate() for beam sampling")
        return steered.generate(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=pad,
        )

    device = input_ids.device
    rows, prompt = input_ids.shape
    tokens = torch.full((rows, prompt + max_new_tokens), pad, dtype=torch.long, device=device)
    tokens[:, :prompt] = input_ids
    mask = torch.ones_like(tokens)
    if attention_mask is not None:
        mask[:, :prompt] = attention_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    stops = torch.tensor(ends, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    accepted = inspect.signature(steered.forward).parameters
    extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    cache = DynamicCache(config=steered.config.get_text_config(decoder=True))
    if streamer is not None:
        streamer.put(input_ids.cpu())
    start = 0
    for end in range(prompt, prompt + max_new_tokens):
        if "position_ids" in accepted:
            extra["position_ids"] = positions[:, start:end]
        pre, ft, _ = steered.logits_to_steer(
            input_ids=tokens[:, start:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        chosen, _ = steer_sample(
            pre[:, -1],
            ft[:, -1],
            steered.mu,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            alpha=steered.alpha,
            penalty=steered.penalty,
            direction=steered.direction,
            generator=generator,
        )
        tokens[:, end] = torch.where(ended, pad, chosen)
        if streamer is not None:
            streamer.put(tokens[:, end].cpu())
        ended |= torch.isin(chosen, stops)
        start = end
        if ended.all():
            break
    if streamer is not None:
        streamer.end()
    return tokens[:, : start + 1]


def _check(input_ids: object, attention_mask: object, max_new_tokens: object, num_beams: object) -> None:
    validation.check_tensor("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.dtype != torch.long:
        raise ValueError(f"input_ids must be (B, T) int64, got {input_ids.dtype} of shape {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids is an empty prompt: shape {tuple(input_ids.shape)}")
    if attention_mask is not None:
        validation.check_tensor("attention_mask", attention_mask)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        if not attention_mask[:, -1].all():
            raise ValueError("attention_mask is 0 at the end of a prompt: pad on the left")
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
