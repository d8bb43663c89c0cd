"""Options that several commands share, and what every command does first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or hub name; left out: SmolLM2-135M-Instruct.")
]
DeviceMapOption = Annotated[
    str | None, typer.Option("--device-map", help="auto, balanced or sequential: spread --model over several cards.")
]
AdapterOption = Annotated[Path | None, typer.Option("--adapter", help="Folder of a PEFT adapter.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def quiet() -> None:
    """Leave stderr to our own progress bars and messages."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
