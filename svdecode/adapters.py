"""What peft put into a model: finding the pre-trained model under an adapter, and running both in one batch."""

from __future__ import annotations

import hashlib

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdecode.shared_weights import share_weights


def causal_lm_of(model: object, name: str = "model") -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(
            f"{name} must be a PeftModel or a causal language model of transformers, got {type(model).__name__}"
        )
    return model


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers of the model that hold adapter weights, in order."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def check_adapter(model: object) -> None:
    """Raise ValueError unless the pre-trained model can be recovered from `model` exactly."""
    if not isinstance(model, PeftModel):
        layers = adapter_layers(model) if isinstance(model, nn.Module) else []
        if not layers:
            raise ValueError("model has no adapter: pass a PeftModel, or the pre-trained model as pretrained=")
    else:
        config = model.active_peft_config
        if config.is_prompt_learning:
            raise ValueError(
                f"{config.peft_type.value} adapters are not supported yet: pass pretrained= and a model of its own"
            )
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"the adapter has bias={config.bias!r}: it trained the pre-trained model's own biases, which are gone. "
                "Pass the pre-trained model as pretrained="
            )
        layers = adapter_layers(model)
        if not layers:
            raise ValueError("model has no adapter layers: the adapter may have been merged and unloaded")
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged into the weights: call unmerge_adapter() first")
    if all(layer.disable_adapters or not layer.active_adapters for layer in layers):
        raise ValueError("no adapter is active: call set_adapter() or enable_adapter_layers() first")


def pretrained_of(model: PreTrainedModel) -> PreTrainedModel:
    """The pre-trained model under the adapters of `model`, over the same weights: every adapter layer left out."""

    def without_adapter(module: nn.Module) -> nn.Module:
        while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
        return module

    return share_weights(model, without_adapter)


class LoraRowScale:
    """LoRA layers whose scale is 0 on the first half of the rows: base and adapted rows share one forward.

    `scaling[adapter]` becomes a (2B, 1, 1) tensor in place of a number; y + s * B(A(x)) with s = 0 is y exactly.
    """

    def __init__(self, model: nn.Module) -> None:
        """Collect the layers of `model`, a tree of its own (`share_weights`) whose scalings may be replaced."""
        self.layers = [
            (layer, adapter, layer.scaling[adapter], layer.lora_A[adapter].weight)
            for layer in adapter_layers(model)
            for adapter in layer.active_adapters
            if adapter in layer.scaling and not layer.disable_adapters
        ]
        self.batch = 0

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether every adapter of the model is plain LoRA on linear layers (no DoRA, biases, embeddings, saved modules)."""
        if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
            return False
        return all(
            type(layer) is LoraLinear
            and not any(layer.use_dora.values())
            and not any(getattr(layer, "lora_variant", {}).values())
            and not any(layer.lora_bias.values())
            for layer in adapter_layers(model)
        )

    def set_batch(self, batch: int) -> None:
        """Prepare the layers for `batch` base rows followed by as many adapted rows."""
        if batch == self.batch:
            return
        scales: dict[tuple, Tensor] = {}
        for layer, adapter, scaling, weight in self.layers:
            key = (scaling, weight.dtype, weight.device)
            if key not in scales:
                scale = torch.zeros(2 * batch, 1, 1, dtype=weight.dtype, device=weight.device)
                scale[batch:] = scaling
                scales[key] = scale
            layer.scaling[adapter] = scales[key]
        self.batch = batch


def adapter_fingerprint(model: object) -> str | None:
    """SHA-256 of the active adapter's weights, which names an adapter wherever it lies; None without an adapter."""
    if not isinstance(model, PeftModel):
        return None
    digest = hashlib.sha256()
    weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
