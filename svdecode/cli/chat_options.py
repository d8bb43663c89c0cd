"""Options of the commands that read examples, and their check against the tokenizer before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

TurnsOption = Annotated[
    str | None,
    typer.Option(
        "--turns", help="Of chat data: which assistant turns count, all or the last. Default: all.", metavar="all|last"
    ),
]
PromptColumnOption = Annotated[
    str | None, typer.Option("--prompt-column", help="Column of the prompts. Default: found by the columns' names.")
]
CompletionColumnOption = Annotated[
    str | None,
    typer.Option("--completion-column", help="Column of the completions. Default: found by the columns' names."),
]


def reading(prompt_column: str | None, completion_column: str | None, turns: str | None) -> dict[str, Any]:
    """Arguments of `svdecode.data.examples.read_examples`; ValueError for a wrong value of --turns."""
    from svdecode.data.conversations import TURNS
    from svdecode.data.examples import COLUMNS

    if turns not in (None, *TURNS):
        raise ValueError(f"--turns must be one of {', '.join(TURNS)}, got {turns!r}")
    return {"columns": (prompt_column or COLUMNS[0], completion_column or COLUMNS[1]), "turns": turns}


def reread(rows: list[Any], columns: tuple[str, str], turns: str | None) -> list[Any]:
    """Rows of `svdecode.data.sources.read_rows` with these columns as prompt and completion, conversations with these turns."""
    from svdecode.data.conversations import conversation, is_conversation
    from svdecode.data.examples import renamed

    found = [renamed(row, columns, row.place) for row in rows]
    return [conversation(row, turns) if turns and is_conversation(row) else row for row in found]


def check_chat(examples: Iterable[Any], model: str | None, adapter: Path | None = None) -> None:
    """Encode the conversations among the examples with the tokenizer alone: a mistake is said before a model is loaded."""
    from svdecode.data.chat import check_conversations
    from svdecode.data.conversations import is_conversation
    from svdecode.models.base_model import load_base_tokenizer

    chats = [example for example in examples if is_conversation(example)]
    if chats:
        check_conversations(chats, load_base_tokenizer(model, adapter))
