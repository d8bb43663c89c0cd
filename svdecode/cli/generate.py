"""`svdecode generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdecode.cli.options import DeviceMapOption, ModelOption, quiet


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the adapter.")],
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    mu: Annotated[float | None, typer.Option(help="Strength; left out: the calibration beside the adapter.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the most probable tokens of this mass.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Answer a prompt from the steered distribution."""
    from svdecode.strength.calibration import Calibration

    strength = Calibration.from_pretrained(adapter) if mu is None else mu
    quiet()
    import torch

    from svdecode.decoding.generate import generate as decode
    from svdecode.models.loading import load_adapter, load_model
    from svdecode.models.steer import steer

    base, tokenizer = load_model(model, device_map)
    steered = steer(load_adapter(base, adapter), mu=strength)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(steered.device)
    tokens = decode(
        steered,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(steered.device).manual_seed(seed),
    )
    print(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
