"""A LoRA adapter's folder: what is in it, and whether vLLM's layers can hold it. Read before vLLM starts."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from svdecode.common.digests import tensors_sha256
from svdecode.models.adapter_fit import check_named_layers, check_trained_on
from svdecode.models.loading import CONFIG_NAME, WEIGHTS_NAME, adapter_config, check_adapter_folder

OTHERWISE = (
    "serve the merged model by itself (peft's merge_and_unload; it is the adapted model, without steering), or steer in "
    "transformers (svdecode.steer)"
)
"""The way out that every refusal of an adapter names."""

_SPLIT_WEIGHTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED = {
    "use_dora": "is a DoRA, whose layers need the norms of whole weights",
    "modules_to_save": "saves whole modules (modules_to_save={!r})",
    "trainable_token_indices": "trains embeddings of tokens",
    "target_parameters": "works on parameters of experts (target_parameters={!r})",
    "lora_bias": "has a bias of its own",
    "layer_replication": "repeats layers",
    "alora_invocation_tokens": "is an activated LoRA, which waits for its invocation tokens",
    "use_qalora": "is a QALoRA",
    "use_bdlora": "is a block-diagonal LoRA",
    "megatron_config": "is made for Megatron's layers",
    "arrow_config": "is a router among adapters",
    "kasa_config": "cuts the rank of the model's weights",
}
"""Settings of peft's LoRA that make another kind of layer out of it, and what they say about an adapter."""


def check(folder: Path) -> None:
    """Raise ValueError unless the folder holds a LoRA on linear layers of a decoder, as peft saves it."""
    check_adapter_folder(folder)
    config = adapter_config(folder)
    why = _why_not(config["peft_type"], config) or _unknown_weights(folder)
    if why is not None:
        raise ValueError(f"the adapter in {folder} {why}: vLLM's layers cannot hold that; {OTHERWISE}")


def check_layers(folder: Path, model: PretrainedConfig) -> None:
    """Raise ValueError where an adapter was trained on a model with more or fewer layers; `svdecode.models.adapter_fit` tells.

    Args:
        folder: of the adapter.
        model: the configuration of the model under it.
    """
    which, config = f"the adapter in {folder}", adapter_config(folder)
    check_trained_on(config, model, which)
    check_named_layers(config, model, which)


def _why_not(kind: str, config: dict[str, Any]) -> str | None:
    if kind != "LORA":
        return f"is {kind} and not LoRA"
    for name, words in _REFUSED.items():
        if config.get(name):
            return words.format(config[name])
    if config.get("bias", "none") != "none":
        return f"trains the model's own biases (bias={config['bias']!r})"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_SPLIT_WEIGHTS):
        return f"was made with init_lora_weights={init!r}, which takes its start out of the weights"
    return None


def _unknown_weights(folder: Path) -> str | None:
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            if "lm_head" in name.split("."):
                return "works on the output head (lm_head)"
            if not re.fullmatch(r".*\.lora_[AB]\.weight", name):
                return f"holds {name}, which is no LoRA of a linear layer"
    return None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors by name, on the CPU."""
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def digest(folder: Path) -> str:
    """SHA-256 of the adapter's files: another adapter at the same path must not meet a compiled graph of the first."""
    found = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        found.update((folder / name).read_bytes())
    return found.hexdigest()


def fingerprint(folder: Path) -> str:
    """`svdecode.models.adapters.adapter_fingerprint` of the adapter, once peft has loaded it; without a model."""
    half = (torch.float16, torch.bfloat16)  # peft holds these as float32
    return tensors_sha256({name: x.float() if x.dtype in half else x for name, x in weights(folder).items()})
