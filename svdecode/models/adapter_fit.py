"""Whether an adapter belongs on a model: as many layers, and a place for each weight. peft passes over both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

_COUNTS = ("num_hidden_layers", "depth", "num_layers")
_TEXT = "text model"


def layer_counts(config: PretrainedConfig) -> dict[str, int]:
    """How many layers the text model has, and each other part that a model's configuration describes, by the part's name."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs if name != "text_config"}
    found = {}
    for name, part in {_TEXT: config.get_text_config(), **parts}.items():
        counts = [getattr(part, key, None) for key in _COUNTS]
        if any(isinstance(count, int) for count in counts):
            found[name] = next(count for count in counts if isinstance(count, int))
    return found


def check_trained_on(adapter: Mapping[str, Any], model: PretrainedConfig, which: str) -> None:
    """Raise ValueError where an adapter is known to have been trained on a model with more or fewer layers.

    That is known where the configuration of the model that it names is on this machine, and of virtual tokens, which save the
    number.

    Args:
        adapter: its configuration, as peft saves it.
        model: the configuration of the model without the adapter.
        which: what the message calls the adapter.
    """
    named, own = adapter.get("base_model_name_or_path"), layer_counts(model)
    trained: dict[str, int] = {}
    if "num_virtual_tokens" in adapter and isinstance(adapter.get("num_layers"), int):
        trained = {_TEXT: adapter["num_layers"]}
    elif named and str(named) != model.name_or_path:
        config = _config_here(str(named), adapter.get("revision"))
        trained = {} if config is None else layer_counts(config)
    for part, count in trained.items():
        if own.get(part, count) != count:
            raise ValueError(
                f"{which} was trained on {named or 'a model'} with {count} layers in its {part}, and this model has "
                f"{own[part]}: use the model that it was trained on"
            )


def check_named_layers(adapter: Mapping[str, Any], model: PretrainedConfig, which: str) -> None:
    """Raise ValueError where an adapter names all layers of a model one by one, and this model has more; arguments as above.

    peft writes "all-linear" out so. An adapter on the lower layers of this very model looks the same, and is accepted where
    it names this model.
    """
    named, targets = adapter.get("base_model_name_or_path"), adapter.get("target_modules")
    if adapter.get("layers_to_transform") is not None or isinstance(targets, str):
        return
    if named and Path(str(named)).name == Path(model.name_or_path).name:
        return
    found = [re.fullmatch(r"(\D*)\.(\d+)\..+", str(target)) for target in targets or ()]
    stacks = {match[1] for match in found if match}
    layers = {int(match[2]) for match in found if match}
    count = layer_counts(model).get(_TEXT, 0)
    if len(stacks) == 1 and all(found) and layers == set(range(len(layers))) and len(layers) < count:
        raise ValueError(
            f"{which} was trained on a model of {len(layers)} layers, whose modules it names one by one, and this model has "
            f"{count}: use the model that it was trained on (if it was trained on the lower layers of this one, write this "
            "one's name as base_model_name_or_path into its adapter_config.json)"
        )


def _config_here(name: str, revision: str | None) -> PretrainedConfig | None:
    """The configuration of a model, if it is a folder or in the hub's cache; nothing is downloaded."""
    try:
        return AutoConfig.from_pretrained(name, revision=revision, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def check_fit(model: PeftModel, folder: str | Path, name: str) -> None:
    """Raise ValueError where an adapter's file and the model that it was loaded into have different weights.

    Args:
        model: the model with the adapter in it.
        folder: which the adapter was loaded from.
        name: of the adapter in the model.
    """
    with safe_open(Path(folder) / WEIGHTS_NAME, framework="pt") as file:
        saved = set(file.keys())
    own = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    unused, missing = sorted(saved - own - set(model.state_dict())), sorted(own - saved)
    if (unused or missing) and not model.peft_config[name].is_prompt_learning:
        # Files of older versions have other names, which peft translates: it says what is left over.
        weights = load_peft_weights(str(folder), device="cpu")
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
        trained = {key for key, _ in model.named_parameters() if f".{name}." in f"{key}."}
        unused, missing = sorted(result.unexpected_keys), sorted(trained.intersection(result.missing_keys))
    if unused or missing:
        which = f"no place for {unused[0]}" if unused else f"nothing for {missing[0]}"
        raise ValueError(
            f"the adapter in {folder} does not fit the model: there is {which} ({len(unused)} weights have no place, "
            f"{len(missing)} are missing): use the model that it was trained on"
        )
