"""A step of `mode="lazy"`: which rows need the pre-trained model, and its logits for these."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdecode.models.forward_inputs import positions_of
from svdecode.models.image_inputs import leave_out
from svdecode.models.lazy_cache import LazyCache
from svdecode.models.rows_of_both import STANDARD
from svdecode.models.vocabulary import check_tokens, in_vocabulary_of


def _own_arguments(inputs: dict[str, object]) -> dict[str, object]:
    """What only these tokens have (images, types of tokens). It cannot wait: the pre-trained model sees it now."""
    return {name: value for name, value in inputs.items() if name not in STANDARD and value is not None}


def rows_needed(inputs: dict[str, object], ft: Tensor, alpha: float) -> Tensor:
    """(B,) bool, on the CPU: the rows with a kept set of more than one token in their adapted logits (B, T, V)."""
    top = ft.float()
    floor = top.amax(-1, keepdim=True) + (math.log(alpha) if alpha > 0 else -math.inf)
    needed = ((top >= floor).sum(-1) != 1).any(-1).cpu()
    return torch.ones_like(needed) if _own_arguments(inputs) else needed


def catch_up(
    models: list[PreTrainedModel],
    caches: list[LazyCache],
    inputs: dict[str, object],
    ft: Tensor,
    needed: Tensor,
    takes_positions: bool,
) -> list[Tensor]:
    """Append a forward's tokens to what waits, and run the rows that are needed.

    Args:
        models: the other models.
        caches: of each.
        inputs: arguments of the adapted model's forward.
        ft: (B, T, V) its logits.
        needed: (B,) bool.
        takes_positions: whether its forward has position_ids.

    Returns:
        (B, T, V) logits of each model, `ft` for rows that are not needed; empty where no row is.
    """
    ids, positions, mask = inputs.get("input_ids"), inputs.get("position_ids"), inputs.get("attention_mask")
    if ids is None:
        raise ValueError("mode='lazy' needs input_ids: inputs_embeds cannot be kept for later")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("mode='lazy' needs an attention_mask (B, S): use mode='two_pass'")
    if positions is None and not takes_positions and mask is not None:
        positions = positions_of(mask)[:, -ids.shape[1] :]
    if positions is not None:
        positions = positions.expand(*positions.shape[:-2], *ids.shape)
    rows = needed.nonzero().squeeze(-1)
    found = []
    for index, (model, cache) in enumerate(zip(models, caches, strict=True)):
        own = leave_out(_own_arguments(inputs), model, index)
        check_tokens(ids, model, ft.shape[-1])
        cache.append(model, ids, positions, mask, alone=bool(own))
        if len(rows):
            logits = cache.catch_up(model, rows, mask, ft.shape[1], **own).to(ft)
            if logits.shape[-1] != ft.shape[-1]:  # else no copy of the adapted rows
                logits = in_vocabulary_of(logits, ft[rows.to(ft.device)])
            found.append(logits if len(rows) == len(ft) else ft.index_copy(0, rows.to(ft.device), logits))
    return found
