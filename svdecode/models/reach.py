"""How far the layers of a model see, and whether what they compute depends on more than the tokens in front."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention")
"""What configurations call the number of tokens that a layer sees."""

_CHANGING = ("dynamic", "longrope")
"""Rotary frequencies that another length changes, for the tokens in front too."""

_EXPERTS = re.compile(r"(moe_)?(num|n)(_[a-z]+)?_experts")
"""num_experts, num_local_experts, n_routed_experts, moe_num_experts, and not num_experts_per_tok."""

_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def _text_config(model: PreTrainedModel) -> object:
    return model.config.get_text_config(decoder=True)


def most_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model takes; None where its configuration does not say."""
    return getattr(_text_config(model), "max_position_embeddings", None)


def keeps_keys_and_values(model: PreTrainedModel) -> bool:
    """Whether all layers of a model's cache do: state-space layers do not."""
    layers = DynamicCache(config=_text_config(model)).layers
    return all(type(layer) in _KEYS_AND_VALUES for layer in layers)


def keeps_some_keys(model: PreTrainedModel) -> bool:
    """Whether a layer of a model's cache does: in a pure state-space model none."""
    layers = DynamicCache(config=_text_config(model)).layers
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def _stores_nothing(layer: object) -> bool:
    """Whether a layer of a cache stands for one that shares another layer's keys (Gemma 3n), or that has no attention."""
    return not isinstance(layer, CacheLayerMixin) and not hasattr(layer, "update_recurrent_state")


def window_of(model: PreTrainedModel) -> int | None:
    """The least number of tokens that a layer sees; 0 where a layer keeps a state of them instead, None where all see all."""
    config = _text_config(model)
    stores = [layer for layer in DynamicCache(config=config).layers if not _stores_nothing(layer)]
    if not all(type(layer) in _KEYS_AND_VALUES for layer in stores):
        return 0
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return min((window for window in windows if isinstance(window, int) and window > 0), default=None)


def frequencies_change(model: PreTrainedModel) -> bool:
    """Whether the length of a sequence changes the rotary frequencies of its tokens."""
    parameters = getattr(_text_config(model), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    return any(kind.get("rope_type") in _CHANGING for kind in kinds)


def frequencies_change_at(model: PreTrainedModel) -> int | None:
    """The number of tokens after which a model takes other frequencies once and for all (longrope); None for no such step."""
    config = _text_config(model)
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    return getattr(config, "original_max_position_embeddings", None) or parameters["original_max_position_embeddings"]


def needs_dynamic_cache(model: PreTrainedModel, virtual_tokens: bool) -> bool:
    """Whether a layer counts keys, of which a static cache has too many.

    GPT-Neo's local layers make their mask from that number. With ALiBi, BLOOM makes its bias as long as the mask, which
    generate() does not prepare where virtual tokens give the two models different masks.
    """
    config = _text_config(model)
    if "local" in getattr(config, "attention_layers", ()):
        return True
    return virtual_tokens and (
        getattr(config, "alibi", False) or any(hasattr(module, "build_alibi_tensor") for module in model.modules())
    )


def keeps_state_in_modules(model: PreTrainedModel) -> bool:
    """Whether a layer keeps the state of a sequence itself, as RecurrentGemma's do, and not in the cache."""
    return any(hasattr(module, "recurrent_states") for module in model.modules())


def counts_experts(config: PreTrainedConfig) -> bool:
    """Whether a configuration says how many experts a model has, under any of the names that there are."""
    text = config.get_text_config(decoder=True)
    parts = (vars(part) for part in (text, getattr(text, "ffn_config", None)) if part is not None)
    return any(value for part in parts for name, value in part.items() if _EXPERTS.fullmatch(name))
