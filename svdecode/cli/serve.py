"""`svdecode serve`: vLLM's own server, on a steered model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_READ = ("hf_overrides", "trust_remote_code", "enable_lora", "revision", "tokenizer", "model_impl", "load_format")
"""The options of vLLM that `engine_args` reads."""


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
    from svdecode.models.base_model import named_base
    from svdecode.models.loading import BUNDLED_NAME, check_adapter_folder
    from svdecode.serving.bundled import bundled_folder
    from svdecode.serving.engine import engine_args

    check_adapter_folder(adapter)
    given, model = _parsed(context.args)
    model = model or named_base(adapter)
    if model is None:
        given.served_model_name = given.served_model_name or [BUNDLED_NAME]
        model = str(bundled_folder())
    options = {name: getattr(given, name) for name in _READ}
    arguments = engine_args(
        model, adapter, mu=mu, alpha=alpha, penalty=penalty, direction=direction, floor=floor, **options
    )
    overrides = arguments["hf_overrides"]
    print(f"svdecode: {overrides['architectures'][0]}, {overrides['svdecode']}", file=sys.stderr)
    for name, value in arguments.items():
        setattr(given, name, value)
    given.dtype = _dtype(given.dtype)
    _run(given)


def _dtype(given: str) -> str:
    """vLLM's "auto" is bfloat16 for most models, which a CPU without AVX-512 computes many times more slowly than float32."""
    import torch
    from vllm.platforms import current_platform

    slow = given == "auto" and current_platform.is_cpu() and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return "float32" if slow else given


def _parsed(arguments: Sequence[str]) -> tuple[Any, str | None]:
    """(vLLM's options as its own parser reads them, the model or None)."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="svdecode serve"))
    given = parser.parse_args(list(arguments))
    named = None if given.model == parser.get_default("model") else given.model
    if given.model_tag is not None and named is not None:
        raise ValueError(f"two models are named, {given.model_tag} and --model {named}: name one")
    return given, given.model_tag or named


def _run(given: Any) -> None:
    """As vLLM's own entry point, which reads the command line."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    from svdecode.serving.requests import refuse_lost_strengths

    cli_env_setup()
    configure_logging_from_args(given)
    validate_parsed_serve_args(given)
    refuse_lost_strengths()
    uvloop.run(run_server(given))
