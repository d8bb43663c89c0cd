"""`svdecode warmstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdecode.commands.options import ModelOption, quiet


def warmstart(
    data: Annotated[Path, typer.Option("--data", help='JSONL of {"prompt", "completion"}.')],
    output: Annotated[Path, typer.Option("--output", help="Folder for the adapter.")],
    model: ModelOption = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 4,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    seed: Annotated[int, typer.Option(help="Of data order, dropout and weights.")] = 0,
) -> None:
    """Train a LoRA on prompts and completions, the loss on the completions."""
    from svdecode.data import read_examples

    examples = read_examples(data)
    quiet()
    from svdecode.loading import load_model
    from svdecode.warmstart import warmstart as train

    base, tokenizer = load_model(model)
    train(
        base,
        tokenizer,
        examples,
        output,
        learning_rate=learning_rate,
        batch_size=batch_size,
        epochs=epochs,
        rank=rank,
        seed=seed,
    )
    print(output)
