"""The thin decoding loop: the paper's Algorithm 1 over `steer_sample`, which never writes a (B, V) distribution.

Both models' logits (lines 4-6), then steering, confidence and choice in one operator (lines 7-20), until all rows have ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdecode.decoding.beams import beam_search
from svdecode.decoding.state import DecodingState
from svdecode.models.steered_model import SteeredModel

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from svdecode.models.steer import SteeredPreTrainedModel
from svdecode.ops import validation
from svdecode.ops.steer_sample import steer_sample


@torch.inference_mode()
def generate(
    steered: SteeredPreTrainedModel,
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
    streamer: BaseStreamer | None = None,
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
        num_beams: beams of each prompt, greedy ones (see `beams.py`); the best sequence is returned.
        eos_token_id: ends a row; None takes the model's generation config.
        generator: source of randomness on the model's device.
        streamer: gets the prompt, then each step's tokens (`put`), then `end()`; as in transformers.

    Returns:
        (B, T + new) int64: prompt first, rows that ended are padded.
    """
    if not isinstance(steered, SteeredModel):
        raise TypeError(f"steered must come from svdecode.steer, got {type(steered).__name__}")
    _check(input_ids, attention_mask, max_new_tokens, num_beams)
    if num_beams > 1 and (temperature > 0 or streamer is not None):
        what = "temperature=0" if temperature > 0 else "streamer=None"
        raise ValueError(f"num_beams above 1 needs {what} here: use steered.generate() for beam sampling")
    validation.check_sampling(temperature, top_k, top_p)
    config = steered.generation_config
    ends = end_tokens(steered, eos_token_id)
    pad = next((token for token in (config.pad_token_id, *ends) if token is not None), 0)
    state = DecodingState(steered, input_ids, attention_mask, max_new_tokens, pad)
    stops = torch.tensor(ends, device=input_ids.device, dtype=torch.long)
    if num_beams > 1:
        return beam_search(state, num_beams, max_new_tokens, stops, pad)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for _ in range(max_new_tokens):
        pre, ft = state.next_logits()
        chosen, _ = steer_sample(
            pre,
            ft,
            steered.settings.mu,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            **steered.settings.keywords,
        )
        if (chosen < 0).any():
            raise RuntimeError("a row's logits are NaN or +inf: no token can be chosen")
        state.append(torch.where(ended, pad, chosen))
        if streamer is not None:
            streamer.put(state.tokens[:, state.end - 1].cpu())
        if len(ends):
            ended |= torch.isin(chosen, stops)
            if ended.all():
                break
    if streamer is not None:
        streamer.end()
    return state.tokens[:, : state.end]


def _check(input_ids: Any, attention_mask: Any, max_new_tokens: Any, num_beams: Any) -> None:
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
    validation.check_count("max_new_tokens", max_new_tokens)
    validation.check_count("num_beams", num_beams)


def end_tokens(steered: Any, eos_token_id: int | list[int] | None = None) -> list[int]:
    """The tokens that end a row: those named, else those of the generation config of a model; empty where it has none."""
    ends = steered.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
