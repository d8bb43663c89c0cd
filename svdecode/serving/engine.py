"""From a model and an adapter to the arguments of a vLLM engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from svdecode.common.text import first_line
from svdecode.constants import Direction
from svdecode.models.loading import check_tokenizer_size, has_tokenizer, load_tokenizer
from svdecode.models.reach import counts_experts
from svdecode.ops.setting import Setting
from svdecode.serving import saved_adapter
from svdecode.serving.engine_config import PAST_LOADING, RECURRENT
from svdecode.serving.names import KEY, PREFIX, TRANSFORMERS_BACKEND, check_version
from svdecode.serving.registration import register
from svdecode.serving.settings import Served
from svdecode.strength.calibration import Calibration


def engine_args(
    model: str | Path,
    adapter: str | Path,
    *,
    mu: float | Calibration | None = None,
    alpha: float | None = None,
    penalty: float | None = None,
    direction: Direction | None = None,
    floor: bool = True,
    **engine: Any,
) -> dict[str, Any]:
    """The arguments of a steered engine: `vllm.LLM(**engine_args(model, adapter))`, or of `vllm.AsyncEngineArgs`.

    Args:
        model: folder or hub name of the model under the adapter.
        adapter: folder of a LoRA that peft has saved.
        mu: steering strength, a number or a Calibration. None takes the calibration beside the adapter. A request may have
            its own: `SamplingParams(extra_args={"svdecode_mu": 0.7})`.
        alpha: confidence threshold in [0, 1]. None follows the calibration; with a number as mu it is 0.1.
        penalty: lambda <= 0 for tokens outside the kept set. None follows the calibration, else it is -inf.
        direction: "kl" or "log_ratio". None follows the calibration, else it is "kl".
        floor: whether tokens outside the kept set keep the adapted model's order, some 1000 nats below it, for masks that
            forbid all kept tokens. With False they have -inf.
        engine: vLLM's own arguments, passed on. `hf_overrides`, a dictionary, is kept and added to. `tokenizer` is the one that
            was saved beside the adapter, where there is one and no other is named.

    Raises:
        ValueError: the adapter, the model or a setting cannot be served; the sentence says what to do. What only vLLM's whole
            configuration shows is refused when the engine starts.
        ImportError: vLLM is missing.
    """
    check_version()
    folder = Path(adapter)
    saved_adapter.check(folder)
    if engine.get("enable_lora"):
        raise ValueError("a steered model cannot be served with enable_lora: it has its own adapter")
    if engine.get("model_impl") not in (None, "auto"):
        raise ValueError(
            f"a steered model cannot be served with model_impl={engine['model_impl']!r}: svdecode chooses vLLM's own class, or "
            "the one around transformers"
        )
    if engine.get("load_format") in PAST_LOADING:
        raise ValueError(f"load_format={engine['load_format']!r} loads no adapter: use safetensors")
    overrides = engine.pop("hf_overrides", None) or {}
    if not isinstance(overrides, dict):
        raise ValueError(f"hf_overrides must be a dictionary, got {type(overrides).__name__}")
    setting = _setting(folder, mu, {"alpha": alpha, "penalty": penalty, "direction": direction})
    config = _config(str(model), bool(engine.get("trust_remote_code")), engine.get("revision"))
    saved_adapter.check_layers(folder, config)
    served = Served(folder.absolute(), setting, floor)
    if engine.get("tokenizer") is None and has_tokenizer(folder):
        check_tokenizer_size(load_tokenizer(adapter=folder), config.get_text_config().vocab_size, folder)
        engine["tokenizer"] = str(folder.absolute())
    return {
        "model": str(model),
        **engine,
        "hf_overrides": {
            **overrides,
            "architectures": [_twin_of(config)],
            KEY: served.to_config(),
        },
    }


def _setting(folder: Path, mu: float | Calibration | None, given: dict[str, Any]) -> Setting:
    given = {name: value for name, value in given.items() if value is not None}
    if mu is not None and not isinstance(mu, Calibration):
        return Setting(mu, **given).check()
    calibration = Calibration.from_pretrained(folder) if mu is None else mu
    return calibration.setting_for(saved_adapter.fingerprint(folder), **given).check()


def _config(model: str, trust_remote_code: bool, revision: str | None) -> PretrainedConfig:
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} is not a model folder: config.json is missing")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the configuration of {model}: {first_line(error)}") from None
    if not config.architectures:
        raise ValueError(f"{model} names no architecture in its config.json")
    return config


def _twin_of(config: PretrainedConfig) -> str:
    """The steered architecture of a model: that of vLLM's own class where it takes a LoRA, else vLLM's around transformers."""
    from vllm.model_executor.models.interfaces import has_inner_state, is_attention_free, is_hybrid, supports_lora
    from vllm.model_executor.models.registry import ModelRegistry

    register()
    architecture = config.architectures[0].removeprefix(PREFIX)
    known = ModelRegistry.models.get(architecture)
    cls = None if known is None else known.load_model_cls()
    if cls is not None and (has_inner_state(cls) or is_attention_free(cls) or is_hybrid(cls)):
        raise ValueError(f"a steered model cannot be served with {RECURRENT}")
    if cls is not None and supports_lora(cls):
        return PREFIX + architecture
    return PREFIX + TRANSFORMERS_BACKEND[counts_experts(config)]
