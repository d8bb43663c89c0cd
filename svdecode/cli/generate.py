"""`svdecode generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdecode.cli.options import DeviceMapOption, JsonOption, ModelOption, quiet
from svdecode.common.files import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STDIN = "-"


def generate(
    prompt: Annotated[
        str, typer.Argument(help="The prompt; - reads it from stdin, without the line break at the end.")
    ],
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the adapter.")],
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    mu: Annotated[
        float | None, typer.Option(help="Steering strength. Default: the calibration beside the adapter.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy decoding. Default: 0, and 1 where --top-k or --top-p is given."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the most probable tokens that have this probability together.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt from the steered distribution."""
    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None else 1.0
    elif temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("--top-k and --top-p sample, and --temperature 0 is greedy: leave --temperature out")
    from svdecode.strength.calibration import Calibration

    strength = Calibration.from_pretrained(adapter) if mu is None else mu
    text = _from_stdin() if prompt == STDIN else prompt
    quiet()
    import torch

    from svdecode.data.batches import prompt_ids
    from svdecode.decoding.generate import generate as decode
    from svdecode.models.base_model import base_name, load_with_adapter
    from svdecode.models.loading import check_adapter_folder
    from svdecode.models.steer import steer

    check_adapter_folder(adapter)
    adapted, tokenizer = load_with_adapter(model, adapter, device_map)
    steered = steer(adapted, mu=strength)
    ids = torch.tensor([prompt_ids(text, tokenizer)], dtype=torch.long, device=steered.device)
    _check_length(ids.shape[1], max_new_tokens, steered)
    tokens = decode(
        steered,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(steered.device).manual_seed(seed),
    )
    answer = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    if not as_json:
        print(answer)
        return
    report = {
        "prompt": text, "answer": answer, "prompt_tokens": ids.shape[1], "new_tokens": tokens.shape[1] - ids.shape[1],
        "model": base_name(model, adapter), "adapter": str(adapter), **steered.settings._asdict(),
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    print(to_json(report))


def _from_stdin() -> str:
    """All of stdin as UTF-8, without one line break at the end; ValueError where it is not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _check_length(prompt: int, new: int, model: PreTrainedModel) -> None:
    """ValueError where a prompt and its answer are longer than the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt + new > limit:
        raise ValueError(
            f"--max-new-tokens {new} after a prompt of length {prompt} is more than the model's {limit} positions: "
            "shorten the prompt or lower --max-new-tokens"
        )
