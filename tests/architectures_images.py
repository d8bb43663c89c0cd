"""Tiny random models with images: a configuration of each type, and prompts with images for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny import PAD, VOCABULARY
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE, VIDEO, START, END = 90, 91, 92, 93
FIRST_SPECIAL = 90
"""Tokens from here on stand for images; the models never generate them."""

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15, "head_dim": 8, "pad_token_id": PAD,
    "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4,
    "initializer_range": 0.15,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_SPECIAL = {"image_token_id": IMAGE, "pad_token_id": PAD, "tie_word_embeddings": False}
_VIDEO = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.15}


def _pixels(*shape: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    return lambda count, generator: {"pixel_values": torch.randn(count, *shape, generator=generator)}


def _nested(*shape: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """Images of a row in a dimension of their own."""
    return lambda count, generator: {"pixel_values": torch.randn(1, count, *shape, generator=generator)}


def _grid(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images of 2 x 2 and of 4 x 2 patches, which are one and two tokens."""
    sizes = torch.tensor([[1, 2, 2], [1, 4, 2]])[:count]
    return {
        "pixel_values": torch.randn(int(sizes.prod(-1).sum()), 96, generator=generator),
        "image_grid_thw": sizes,
    }


ARCHITECTURES: dict[str, tuple[dict, Callable, dict]] = {
    # configuration; images of a row; more: tokens per image, the argument that marks their tokens, the type of a new token
    "llava": (
        {
            "text_config": {"model_type": "llama", **_TEXT}, "vision_feature_layer": -1, "image_token_index": IMAGE,
            "vision_config": {"model_type": "clip_vision_model", **_TOWER, "image_size": 8, "projection_dim": 32},
            "vision_feature_select_strategy": "default",
        },
        _pixels(3, 8, 8),
        {"tokens": 4},
    ),
    "qwen2_vl": (
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE}, **_VIDEO,
            "vision_config": {**_PATCHES, "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        },
        _grid,
        {"tokens": (1, 2), "types": "mm_token_type_ids"},
    ),
    "qwen2_5_vl": (
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE}, **_VIDEO,
            "vision_config": {
                **_PATCHES, "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
                "fullatt_block_indexes": [1], "window_size": 16,
            },
        },
        _grid,
        {"tokens": (1, 2), "types": "mm_token_type_ids"},
    ),
    "qwen3_vl": (
        {
            "text_config": {**_TEXT, "rope_parameters": {**_ROPE, "mrope_interleaved": True}}, **_VIDEO,
            "vision_config": {
                **_PATCHES, "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
                "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            },
        },
        _grid,
        {"tokens": (1, 2), "types": "mm_token_type_ids"},
    ),
    "gemma3": (
        {
            "text_config": {
                **_TEXT, "sliding_window": 6, "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {**_TOWER, "image_size": 16, "vision_use_head": False},
            "mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": END,
        },
        _pixels(3, 16, 16),
        {"tokens": 4, "types": "token_type_ids"},
    ),
    "paligemma": (
        {
            "text_config": {"model_type": "gemma", **_TEXT}, "projection_dim": 32, "hidden_size": 32,
            "vision_config": {"model_type": "siglip_vision_model", **_TOWER, "image_size": 8, "vision_use_head": False},
        },
        _pixels(3, 8, 8),
        {"tokens": 4, "types": "token_type_ids", "of_image": 0, "of_new": 1},
    ),
    "idefics3": (
        {
            "text_config": {"model_type": "llama", **_TEXT}, "vision_config": {**_TOWER, "image_size": 16}, "scale_factor": 2,
        },
        _nested(3, 16, 16),
        {"tokens": 4},
    ),
    "smolvlm": (
        {
            "text_config": {"model_type": "llama", **_TEXT}, "vision_config": {**_TOWER, "image_size": 16}, "scale_factor": 2,
        },
        _nested(3, 16, 16),
        {"tokens": 4},
    ),
}  # fmt: skip


class NoImages(nn.Linear):
    """A head that gives tokens of images no chance: a random model would generate them, and has no image for them."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        logits[..., FIRST_SPECIAL:] = -1e4
        return logits


def image_model(name: str) -> PreTrainedModel:
    """Two layers of random weights behind a tower of two."""
    options = ARCHITECTURES[name][0]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **_SPECIAL, **options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    model.get_output_embeddings().__class__ = NoImages
    return model


def image_row(name: str, length: int, images: int, seed: int = 1) -> dict[str, Tensor]:
    """One row (1, length) of tokens with images in front, as a processor makes it."""
    _, draw, more = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, FIRST_SPECIAL, (1, length), generator=generator)
    tokens = more["tokens"] if isinstance(more["tokens"], tuple) else (more["tokens"],) * images
    at = 0
    for count in tokens[:images]:
        ids[0, at : at + count + 2] = torch.tensor([START, *[IMAGE] * count, END])
        at += count + 2
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **draw(images, generator)}
    if "types" in more:
        row[more["types"]] = (ids == IMAGE).long() * more.get("of_image", 1)
    return row


def one_more(name: str, row: dict[str, Tensor], token: Tensor) -> dict[str, Tensor]:
    """The row with another token of text (1, 1)."""
    more = ARCHITECTURES[name][2]
    longer = {"input_ids": token, "attention_mask": torch.ones_like(token)}
    if "types" in more:
        longer[more["types"]] = torch.full_like(token, more.get("of_new", 0))
    return {key: torch.cat([value, longer[key]], 1) if key in longer else value for key, value in row.items()}


def together(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A left-padded batch of rows, with their images one after another."""
    width = max(row["input_ids"].shape[1] for row in rows)
    images = max(row["pixel_values"].shape[1] for row in rows)
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].shape == rows[0]["input_ids"].shape:
            values = [nn.functional.pad(value, (width - value.shape[1], 0), value=PAD) for value in values]
        elif values[0].dim() == 5:  # images of a row in a dimension of their own: no image is zeros
            values = [nn.functional.pad(value, (0, 0) * 3 + (0, images - value.shape[1])) for value in values]
        batch[key] = torch.cat(values)
    return batch
