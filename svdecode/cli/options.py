"""Options that several commands share, and what every command does first."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from svdecode.common.files import check_writable

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder or hub name of the pre-trained model. Default: the base model that the adapter names, else "
        "the bundled SmolLM2-135M-Instruct (extra demo).",
    ),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option("--device-map", help="Spread the model over several cards: auto, balanced or sequential."),
]
AdapterOption = Annotated[Path | None, typer.Option("--adapter", help="Folder of a PEFT adapter.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

STDIN = "-"
"""A prompt that is read from stdin."""

_WRITING_FAILED = ("Error while serializing", "PytorchStreamWriter", "inline_container")
"""Words of safetensors and torch.save for a disk that is full."""


def only_our_warnings() -> None:
    """Show svdecode's own warnings as one line each, and none of other libraries; what `python -W` says goes first."""
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"svdecode(\.|$)")
    warnings.formatwarning = lambda message, *_, **__: f"svdecode: {message}\n"


def quiet() -> None:
    """Leave stderr to our own progress bars and messages: transformers logs errors only and draws no bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextlib.contextmanager
def writing_to(folder: Path | None) -> Iterator[None]:
    """Check before the work that a folder can be written; say so too if the disk fills up during the work. None is no folder.

    Raises:
        ValueError: the folder cannot be written, before or after the work. torch and safetensors do not raise OSError on a
            full disk, so their errors are known by their words.
    """
    if folder is None:
        yield
        return
    check_writable(folder)
    try:
        yield
    except Exception as error:
        check_writable(folder)
        if any(words in str(error) for words in _WRITING_FAILED):
            raise ValueError(f"{folder} cannot be written: {error}") from None
        raise


def from_stdin() -> str:
    """All of stdin as UTF-8, without one line break at the end; ValueError where it is not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")
