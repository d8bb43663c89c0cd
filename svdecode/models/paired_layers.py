"""Adapter layers that see base rows and adapted rows in one batch: [pre-trained | adapted].

Plain LoRA takes a scale of 0 on the base rows, which costs nothing. For any other layer of peft, the base layer computes one
half of the rows and the adapted layer the other. Both are exact, as `tests/test_tuners.py` shows for every tuner of peft.
"""

from __future__ import annotations

import inspect

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from svdecode.models.forward_inputs import CACHE_NAMES
from svdecode.models.image_inputs import modules_for_images
from svdecode.models.shared_weights import device_of

# Layers that get (rows x tokens, features), by the type of the model.
_FLATTENED = {"opt": ("fc1", "fc2")}


_MIXED = (
    "{} is given {} rows and not {}: this model mixes the rows of a batch, and pre-trained and adapted rows cannot share one "
    "forward. Use mode='two_pass'"
)


class ScaledLayer(LoraLinear):
    """Plain LoRA with a scale for each row, (2B, 1, 1); the class of an existing layer is changed to it."""

    paired_rows: int

    def forward(self, x: Tensor, *arguments: object, **keywords: object) -> Tensor:
        """(2B, T, in) to (2B, T, out); of a model with more axes, (2B, ..., in) to (2B, ..., out)."""
        if x.dim() == 3 and x.shape[0] in (self.paired_rows, 1):  # 1: the same for all rows
            return super().forward(x, *arguments, **keywords)
        if x.shape[0] != self.paired_rows:
            raise RuntimeError(_MIXED.format("a layer with LoRA", x.shape[0], self.paired_rows))
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return super().forward(rows, *arguments, **keywords).reshape(*x.shape[:-1], -1)


class HalvedLayer(nn.Module):
    """An adapter layer whose base layer alone computes the first half of the rows."""

    def __init__(self, adapted: nn.Module, name: str, of_images: bool = False) -> None:
        """Wrap a BaseTunerLayer, or a wrapper of a saved module or of trained tokens; `name` is for messages.

        With `of_images` the rows are images or patches, of both models, and there may be any number of them.
        """
        super().__init__()
        self.adapted = adapted
        self.name = name
        self.of_images = of_images
        self.batch = self.tokens = 0

    @property
    def base(self) -> nn.Module:
        """The layer without the adapter."""
        return without_adapter(self.adapted)

    def forward(self, *arguments: object, **keywords: object) -> Tensor:
        """(2B, ...) rows in, (2B, ...) rows out; or, of a model that flattens them, (2B x T, ...)."""
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor) and value.dim()]
        rows = tensors[0].shape[0]
        known = rows in (2 * self.batch, self.tokens) or (self.of_images and rows % 2 == 0)
        if not known or any(value.shape[0] != rows for value in tensors):
            given = ", ".join(str(value.shape[0]) for value in tensors)
            raise RuntimeError(_MIXED.format(self.name, given, 2 * self.batch))
        halves = []
        for layer, half in ((self.base, slice(0, rows // 2)), (self.adapted, slice(rows // 2, rows))):
            own = [value[half] if isinstance(value, Tensor) and value.dim() else value for value in arguments]
            named = {
                k: value[half] if isinstance(value, Tensor) and value.dim() else value for k, value in keywords.items()
            }
            halves.append(layer(*own, **named))
        if not all(isinstance(half, Tensor) for half in halves):
            raise RuntimeError(
                f"{self.name} gives more than one tensor, which two halves of the rows cannot. Use mode='two_pass'"
            )
        return torch.cat(halves)

    def __getattr__(self, name: str) -> object:
        """The base layer answers what else a model asks of the layer, such as its weight's dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)


def is_adapted(module: nn.Module) -> bool:
    """Whether peft put something into this module itself."""
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def without_adapter(module: nn.Module) -> nn.Module:
    """The module under all adapters."""
    while is_adapted(module):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module


def wrapped_block(model: nn.Module) -> str | None:
    """The name of a saved module that writes into the cache, which two halves of the rows cannot do one after another."""
    for name, module in model.named_modules():
        if is_adapted(module):
            parameters = inspect.signature(without_adapter(module).forward).parameters
            if any(cache in parameters for cache in (*CACHE_NAMES, "layer_past", "past_key_value", "cache_params")):
                return name
    return None


def _takes_row_scale(layer: nn.Module, flattened: bool) -> bool:
    """Whether the layer is plain LoRA on a linear layer: no DoRA or other variant, no trained bias."""
    return (
        type(layer) is LoraLinear
        and not is_adapted(layer.base_layer)  # whose own adapter a scale of 0 would leave on the base rows
        and not flattened
        and not any(layer.use_dora.values())
        and not any(getattr(layer, "lora_variant", {}).values())
        and not any(layer.lora_bias.values())
    )


class PairedLayers:
    """The adapter layers of a model, told of the number of rows before each forward."""

    def __init__(self, model: nn.Module) -> None:
        """Take over the layers of `model`, a tree of its own (`share_weights`) that may be changed."""
        self.batch = self.tokens = 0
        self.for_images = modules_for_images(model)
        self.flattened = _FLATTENED.get(model.config.model_type, ())
        self.halved: list[HalvedLayer] = []
        self.layers: list[ScaledLayer] = []
        # (layer, adapter, its scale, the layer's first matrix)
        self.scaled: list[tuple[LoraLinear, str, float, nn.Module]] = []
        self._take_over(model, "")

    def _take_over(self, module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            of_images = id(child) in self.for_images
            if not of_images and _takes_row_scale(child, name in self.flattened):
                child.__class__ = ScaledLayer
                child.paired_rows = 0
                active = [adapter for adapter in child.active_adapters if adapter in child.scaling]
                self.layers.append(child)
                if not child.disable_adapters:
                    self.scaled += [(child, a, child.scaling[a], child.lora_A[a]) for a in active]
            elif is_adapted(child):
                halved = HalvedLayer(child, path, of_images)
                self.halved.append(halved)
                module._modules[name] = halved
            else:
                self._take_over(child, f"{path}.")

    def set_rows(self, batch: int, length: int) -> None:
        """Prepare the layers for `batch` base rows followed by as many adapted rows, of `length` tokens each."""
        for layer in self.halved:
            layer.batch, layer.tokens = batch, 2 * batch * length if self.flattened else 2 * batch
        if batch == self.batch:
            return
        for layer in self.layers:
            layer.paired_rows = 2 * batch
        scales: dict[tuple, Tensor] = {}
        for layer, adapter, scaling, matrix in self.scaled:
            key = (scaling, matrix.weight.dtype, device_of(matrix))
            if key not in scales:
                # y + s * B(A(x)) with s = 0 is y exactly
                with torch.inference_mode(False):  # the scale stays, and a training step may be next
                    scale = torch.zeros(2 * batch, 1, 1, dtype=key[1], device=key[2])
                    scale[batch:] = scaling
                scales[key] = scale
            layer.scaling[adapter] = scales[key]
        self.batch = batch
