"""The base model of an adapter: the one that its configuration names, unless the user names another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdecode.common.distributed import is_main
from svdecode.models.loading import (
    BUNDLED_NAME,
    BUNDLED_PACKAGE,
    adapter_config,
    check_adapter_folder,
    load_adapter,
    load_model,
    load_tokenizer,
)


def named_base(adapter: str | Path) -> str | None:
    """What an adapter's configuration says of its base model; None where it says nothing, or names the bundled model."""
    named = _named(adapter)
    return None if named is None or _is_bundled(named) else named


def _named(adapter: str | Path) -> str | None:
    named = adapter_config(adapter).get("base_model_name_or_path")
    return str(named) if named else None


def _is_bundled(named: str) -> bool:
    """Whether a name is that of the bundled model, which is a GGUF file in the folder of a package, here or elsewhere."""
    return Path(named).name in (BUNDLED_PACKAGE, BUNDLED_NAME) and not Path(named, "config.json").is_file()


def base_name(model: str | None, adapter: str | Path | None) -> str:
    """What reports call the model that `load_base` loads."""
    return model or (named_base(adapter) if adapter is not None else None) or BUNDLED_NAME


def load_base(
    model: str | None, adapter: str | Path | None, device_map: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model for an adapter, and its tokenizer.

    Args:
        model: a folder or hub name; None takes what the adapter names, and the bundled model where there is no adapter or it
            names none. Another model than the adapter names is loaded with a warning on stderr.
        adapter: folder of an adapter, or None.
        device_map: as in `svdecode.models.loading.load_model`.

    Raises:
        ValueError: no adapter there, or no such model; where the adapter names it, the message says so and names --model.
    """
    if adapter is None:
        return load_model(model, device_map)
    check_adapter_folder(adapter)
    named = _named(adapter)
    if model is None and named is not None and not _is_bundled(named):
        try:
            return load_model(named, device_map, adapter)
        except ValueError as error:
            raise ValueError(
                f"the adapter in {adapter} was trained on {named}, which cannot be loaded here ({error}): "
                "say where that model is with --model"
            ) from None
    if model is not None and named is not None and not _same(model, named) and is_main():
        print(
            f"svdecode: the adapter in {adapter} was trained on {named}, and --model is {model}: "
            "if that is another model, the answers are wrong",
            file=sys.stderr,
        )
    return load_model(model, device_map, adapter)


def load_base_tokenizer(model: str | None, adapter: str | Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer alone that `load_base` loads with the model; ValueError where there is none."""
    return load_tokenizer(model or (named_base(adapter) if adapter is not None else None), adapter)


def load_with_adapter(
    model: str | None, adapter: str | Path | None, device_map: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The adapter on its base model (`load_base`), a PeftModel, and the tokenizer; without an adapter the model alone.

    Raises:
        ValueError: as `load_base`, or as `svdecode.models.loading.load_adapter`.
    """
    base, tokenizer = load_base(model, adapter, device_map)
    if adapter is None:
        return base, tokenizer
    return load_adapter(base, adapter), tokenizer


def _same(model: str, named: str) -> bool:
    """Whether two names mean one model, as far as names tell: equal, one folder, or one last part."""
    if _is_bundled(named):
        return Path(model).name == BUNDLED_NAME
    return model == named or Path(model).resolve() == Path(named).resolve() or Path(model).name == Path(named).name
