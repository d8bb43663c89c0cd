"""What a steered model leaves to the owner of the weights: to save, move, convert and adapt them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from svdecode.models.shared_weights import device_of


class BorrowedWeights(nn.Module):
    """A model over the weights of another one."""

    @property
    def device(self) -> torch.device:
        """Where the model computes, also where its weights are offloaded."""
        return device_of(self)

    def save_pretrained(self, *_: object, **__: object) -> None:
        """Raise ValueError: a steered model has nothing of its own to save."""
        raise ValueError("a steered model shares its weights: save the model or adapter, and the calibration beside it")

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> BorrowedWeights:
        """`to()`, `half()` and their kin: not of weights that another model shares."""
        weight = next(self.parameters()).data
        moved = function(weight.flatten()[:0])
        if (moved.dtype, moved.device) != (weight.dtype, weight.device):
            raise RuntimeError("a steered model shares its weights: move or convert the model, and steer it again")
        return self

    def _change(self, *_: object, **__: object) -> Any:
        """Raise RuntimeError: the owner of the weights changes adapters and embeddings."""
        raise RuntimeError(
            "a steered model keeps the adapter and the embeddings that it was made with: change the model, and steer it again"
        )

    def _no_blocks(self, *_: object, **__: object) -> Any:
        """Raise ValueError: what batches continuously has a cache of its own, of one model."""
        raise ValueError("continuous batching keeps a cache of one model: use generate() with left-padded prompts")

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _no_blocks
    add_adapter = load_adapter = set_adapter = delete_adapter = _change
    enable_adapters = disable_adapters = resize_token_embeddings = _change
