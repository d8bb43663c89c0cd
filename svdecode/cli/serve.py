"""`svdecode serve`: vLLM's own server, on a steered model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_OVERRIDES = "--hf-overrides"


def serve(
    context: typer.Context,
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the LoRA.")],
    mu: Annotated[
        float | None, typer.Option(help="Steering strength. Default: the calibration beside the adapter.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Confidence threshold. Default: the calibration's, else 0.1.")
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(help="For tokens outside the kept set. Default: the calibration's, else -inf.")
    ] = None,
    direction: Annotated[str | None, typer.Option(help="kl or log_ratio. Default: the calibration's, else kl.")] = None,
    floor: Annotated[
        bool, typer.Option(help="Let the adapted model choose where a grammar or a list forbids all kept tokens.")
    ] = True,
) -> None:
    """Serve a steered model over HTTP, with vLLM.

    svdecode serve MODEL --adapter FOLDER [--mu 0.5] [--port 8000 and every other option of vLLM's server]

    MODEL is a folder or a hub name; left out, it is the model that the adapter names, else the bundled SmolLM2-135M-Instruct
    (extra demo). A request may have a strength of its own: "vllm_xargs": {"svdecode_mu": 0.7}.
    """
    from svdecode.serving.names import check_version

    check_version()
    model, rest = _split(context.args)
    from svdecode.models.base_model import base_name, named_base
    from svdecode.models.loading import check_adapter_folder
    from svdecode.serving.bundled import bundled_folder
    from svdecode.serving.engine import engine_args

    check_adapter_folder(adapter)
    served_name = base_name(model, adapter)
    model = model or named_base(adapter)
    overrides, rest = _take_overrides(rest)
    options: dict[str, Any] = {"hf_overrides": overrides, "trust_remote_code": "--trust-remote-code" in rest}
    options["enable_lora"] = "--enable-lora" in rest
    arguments = engine_args(
        str(bundled_folder()) if model is None else model,
        adapter,
        mu=mu,
        alpha=alpha,
        penalty=penalty,
        direction=direction,
        floor=floor,
        **options,
    )
    overrides = arguments["hf_overrides"]
    print(f"svdecode: {overrides['architectures'][0]}, {overrides['svdecode']}", file=sys.stderr)
    from vllm.entrypoints.launchers.api_server.entry import main

    named = ["--served-model-name", served_name] if model is None and not _has(rest, "--served-model-name") else []
    sys.argv = ["svdecode serve", "--model", arguments["model"], *named, *rest, _OVERRIDES, json.dumps(overrides)]
    main()


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the model, or None; the options of vLLM): what does not begin with a dash comes first."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


def _has(arguments: Sequence[str], name: str) -> bool:
    return any(word == name or word.startswith(f"{name}=") for word in arguments)


def _take_overrides(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The user's own --hf-overrides, and the other arguments."""
    found, rest, words = {}, [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != _OVERRIDES:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        try:
            found = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{_OVERRIDES} must be JSON, got {value!r}: {error}") from None
    return found, rest
