"""The arguments of one forward for the rows of both models, [pre-trained | adapted]; none is dropped without a word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from svdecode.models.forward_inputs import CACHE

ROWS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids")
"""Arguments whose first dimension is the batch, or 1 for all rows."""

STANDARD = (
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", CACHE, "use_cache"),
    *("return_dict", "logits_to_keep", "output_hidden_states", "output_attentions"),
)
"""What nearly every forward takes; other arguments say something about the tokens that these do not."""

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Where sequences begin that lie in one row; the arguments of flash attention."""

IMAGES = ("pixel", "image", "video", "patch", "grid", "vision", "spatial_shapes", "aspect_ratio", "feature", "audio")
"""Parts of the names of arguments whose first dimension counts images, patches or frames, in the order of the rows."""


FEATURES = "mm_encoder_outputs"
"""The argument for images that are encoded already (`image_inputs.py`)."""


def is_of_images(name: str) -> bool:
    """Whether an argument of a forward is of images (or sound), which both models must see."""
    return any(part in name for part in IMAGES)


def rows_of_both(pre: dict[str, object], ft: dict[str, object], batch: int) -> dict[str, object]:
    """Arguments of one forward of 2 x `batch` rows; ValueError for one of which it is unknown where its rows are."""
    return {name: of_both(name, pre.get(name), value, batch) for name, value in ft.items()}


def of_both(name: str, pre: object, ft: object, batch: int) -> object:
    """One argument of the pre-trained rows and of the adapted rows. Masks may be 4-d, one for each kind of layer, or None."""
    if name == FEATURES:
        return ft
    if isinstance(ft, dict):
        return {kind: of_both(name, pre[kind], value, batch) for kind, value in ft.items()}
    if isinstance(ft, list) and is_of_images(name) and ft and not isinstance(ft[0], int):
        return [*pre, *ft]
    if not isinstance(ft, Tensor) or ft.dim() == 0 or name == "cache_position":
        return ft
    if name == "position_ids":  # (B, T), or with several axes (axes, B, T)
        return torch.cat([rows.expand(*rows.shape[:-2], batch, rows.shape[-1]) for rows in (pre, ft)], -2)
    if name in ROWS:
        return torch.cat([rows.expand(batch, *rows.shape[1:]) for rows in (pre, ft)])
    if name not in PACKED and (is_of_images(name) or ft.shape[0] == batch):
        return torch.cat([pre, ft])
    raise ValueError(
        f"mode='paired' does not know where the rows of the argument {name} are, of shape {tuple(ft.shape)}: "
        "use mode='two_pass'"
    )


@contextlib.contextmanager
def offsets_of_both(model: nn.Module, batch: int) -> Iterator[None]:
    """Double, for the length of a forward, the offsets of positions that Qwen2-VL and its kin keep in the model."""
    holder = getattr(model, "base_model", model)
    offsets = getattr(holder, "rope_deltas", None)
    if isinstance(offsets, Tensor) and batch % offsets.shape[0] == 0:
        offsets = offsets.repeat_interleave(batch // offsets.shape[0], 0)
        holder.rope_deltas = torch.cat([offsets, offsets])
    try:
        yield
    finally:
        offsets = getattr(holder, "rope_deltas", None)
        if isinstance(offsets, Tensor) and offsets.shape[0] == 2 * batch:
            holder.rope_deltas = offsets[batch:]
