"""What peft put into a model: finding the pre-trained model under an adapter."""

from __future__ import annotations

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from svdecode.common.digests import tensors_sha256
from svdecode.models.adapter_fit import check_trained_on
from svdecode.models.paired_layers import without_adapter
from svdecode.models.shared_weights import share_weights, uncompiled

_UNSUPPORTED = {
    "LILY": "its router averages over all tokens of a batch, so that a cached step gives other numbers than a whole forward",
    "MULTITASK_PROMPT_TUNING": "it needs task ids at every forward",
    "POLY": "it needs task ids at every forward",
    "SHADOW": "it replaces the hidden states that pass between layers",
    "XLORA": "it runs a forward of its own to choose among adapters",
}
_SPLIT_WEIGHTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def causal_lm_of(model: object, name: str = "model") -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself; uncompiled."""
    model = uncompiled(model)
    if isinstance(model, PeftMixedModel | BaseTuner):
        model = uncompiled(model.model)
    if isinstance(model, PeftModel):
        model = uncompiled(model.get_base_model())
        if isinstance(model, PeftModel):
            raise ValueError(
                f"{name} is a PeftModel inside a PeftModel: put both adapters on one model with load_adapter() or add_adapter()"
            )
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise TypeError(
            f"{name} must be a PeftModel or a causal language model of transformers, got {type(model).__name__}"
        )
    return model


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers of the model that hold adapter weights, in order."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _what_changed_the_model(config: PeftConfig) -> str | None:
    """The setting with which an adapter changes the weights or layers that it is put on; None for most adapters.

    peft makes an ordinary adapter of the first kind with `save_pretrained(path_initial_model_for_weight_conversion=)`.
    """
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_SPLIT_WEIGHTS):
        return f"init_lora_weights={init!r}, which takes the adapter's start out of the weights"
    if getattr(config, "kasa_config", None) is not None:
        return "kasa_config, which cuts the weights' rank"
    if getattr(config, "layer_replication", None):
        return "layer_replication, which repeats layers"
    if getattr(config, "bias", "none") != "none":
        return f"bias={config.bias!r}, which trains the model's own biases"
    return None


def is_prompt_learning(model: PeftModel) -> bool:
    """Whether the active adapter is virtual tokens and not weights inside the model."""
    return model.active_peft_config.is_prompt_learning


def active_adapters(model: object) -> list[str]:
    """The names of a model's active adapters, which peft or transformers put into it."""
    if isinstance(model, PeftModel):
        return list(model.active_adapters)
    layers = adapter_layers(model) if isinstance(model, nn.Module) else []
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def check_adapter(model: object) -> None:
    """Raise ValueError unless the pre-trained model can be recovered from `model` exactly."""
    known: dict[str, PeftConfig] = getattr(model, "peft_config", None) or {}
    for name, config in known.items():
        why = _what_changed_the_model(config)  # an adapter that is not active has changed it too
        if why is not None:
            raise ValueError(
                f"the adapter {name!r} was made with {why}, so that what lies under it is not the pre-trained model: load that "
                "once more, and pass it as pretrained="
            )
    for name, config in ((name, known[name]) for name in active_adapters(model) if name in known):
        check_trained_on(config.to_dict(), causal_lm_of(model).config, f"the adapter {name!r}")
        if config.peft_type.value in _UNSUPPORTED:
            why = _UNSUPPORTED[config.peft_type.value]
            raise ValueError(f"{config.peft_type.value} adapters are not supported: {why}. Pass pretrained=")
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError("activated LoRA is not supported: peft looks for its invocation tokens outside the model")
    if isinstance(model, PeftModel) and is_prompt_learning(model):
        return
    layers = adapter_layers(model) if isinstance(model, nn.Module) else []
    if not layers and isinstance(model, PeftModel):
        raise ValueError("model has no adapter layers: the adapter may have been merged and unloaded")
    if not layers:
        raise ValueError("model has no adapter: pass a PeftModel, or the pre-trained model as pretrained=")
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged into the weights: call unmerge_adapter() first")
    if all(layer.disable_adapters or not layer.active_adapters for layer in layers):
        raise ValueError("no adapter is active: call set_adapter() or enable_adapter_layers() first")


def pretrained_of(model: PreTrainedModel) -> PreTrainedModel:
    """The pre-trained model under the adapters of `model`, over the same weights: every adapter layer left out."""
    return share_weights(model, without_adapter)


def adapter_fingerprint(model: object) -> str | None:
    """SHA-256 of the active adapter's weights, which names an adapter wherever it lies; None without an adapter."""
    if not isinstance(model, PeftModel):
        return None
    weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError(
            "the adapter's weights are offloaded, so that no calibration can be found for it: pass a number as mu"
        )
    return tensors_sha256(weights)
