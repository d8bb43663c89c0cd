"""Where vLLM enters: `register` gives every architecture that vLLM knows a steered twin, which is built on first use.

vLLM calls it in every process of every engine on the machine, also of engines that steer nothing. So it imports neither torch
nor any of svdecode's operators, and it may be called again.
"""

from __future__ import annotations

import importlib
from typing import Any

from svdecode.serving.names import PREFIX

_TWINS = "svdecode.serving.model"
_CHECKS = "svdecode.serving.engine_config"


def register() -> None:
    """Entry point of the group `vllm.general_plugins`."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in list(ModelRegistry.models):
        if architecture.startswith(PREFIX):
            continue
        twin = PREFIX + architecture
        if twin not in ModelRegistry.models:
            ModelRegistry.register_model(twin, f"{_TWINS}:{twin}")
        if twin not in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[twin] = _hooks(MODELS_CONFIG_MAP.get(architecture))


def _hooks(original: Any) -> Any:
    """What vLLM calls with the configuration of an engine, before any process of it starts: ours, then the architecture's."""

    class Hooks:
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            importlib.import_module(_CHECKS).prepare(vllm_config)
            if original is not None:
                original.verify_and_update_config(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if original is not None:
                original.verify_and_update_model_config(model_config)

    return Hooks
