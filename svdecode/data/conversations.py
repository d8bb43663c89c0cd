"""Conversations: rows of chat data in their layouts, brought into one, and which of their turns carry the loss.

A conversation is a row {"prompt": [message, ...], "completion": [message, ...]}, TRL's layout. The prompt of a row with
`messages` ends before the first assistant turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TURNS = ("all", "last")
"""Which assistant turns of a completion carry the loss; the first is the default."""

ASSISTANT = "assistant"
MESSAGES, SHARE_GPT = "messages", "conversations"
CHAT_COLUMNS = (MESSAGES, SHARE_GPT)
TOOLS = "tools"

_SHARE_GPT_ROLES = {"human": "user", "gpt": ASSISTANT}


class Row(dict):
    """A row of data that knows where it comes from. Equal to a dict with the same columns."""

    def __init__(self, columns: Mapping[str, Any], place: str = "", turns: str = TURNS[0]) -> None:
        """Take the columns.

        Args:
            columns: of the row.
            place: file and line, for messages.
            turns: one of `TURNS`, for a conversation.
        """
        super().__init__(columns)
        self.place, self.turns = place, turns


def is_conversation(row: object) -> bool:
    """Whether a row holds messages rather than texts."""
    if not isinstance(row, Mapping):
        return False
    if row.get(MESSAGES) is not None or isinstance(row.get(SHARE_GPT), list | tuple):
        return True
    return any(isinstance(row.get(column), list | tuple) for column in ("prompt", "completion"))


def conversation(row: Mapping[str, Any], turns: str | None = None, place: str = "") -> Row:
    """A row of chat data in the layout of this file; what is one already is left as it is.

    Args:
        row: with `messages` ([{"role", "content"}, ...]), with `conversations` ([{"from", "value"}, ...], ShareGPT's), or with
            `prompt` and `completion` as lists of messages (TRL's). A column `tools` goes to the chat template.
        turns: "all" or "last", which assistant turns of the completion carry the loss; None keeps what the row says, else all.
        place: file and line, for messages; a `Row` knows its own.

    Raises:
        ValueError: no assistant turn that could carry the loss, or a message that is none.
    """
    place = getattr(row, "place", "") or place
    turns = turns or getattr(row, "turns", TURNS[0])
    if turns not in TURNS:
        raise ValueError(f"turns must be one of {', '.join(TURNS)}, got {turns!r}")
    if row.get(MESSAGES) is not None:
        column, all_turns = MESSAGES, _messages(row[MESSAGES], MESSAGES, place)
    elif row.get(SHARE_GPT) is not None:
        column, all_turns = SHARE_GPT, _messages(_from_share_gpt(row[SHARE_GPT]), SHARE_GPT, place)
    else:
        column = "completion"
        prompt, completion = (_messages(row.get(name), name, place) for name in ("prompt", "completion"))
    if column != "completion":
        first = next((i for i, message in enumerate(all_turns) if message["role"] == ASSISTANT), len(all_turns))
        prompt, completion = all_turns[:first], all_turns[first:]
    if not any(message["role"] == ASSISTANT for message in completion):
        raise ValueError(f"{_at(place)}{column} has no assistant turn: there is nothing to learn from it")
    tools = {TOOLS: row[TOOLS]} if row.get(TOOLS) else {}
    return Row({"prompt": prompt, "completion": completion, **tools}, place, turns)


def labelled_turns(example: Row) -> tuple[list[dict[str, Any]], list[int]]:
    """The messages of a conversation up to the last that carries the loss, and the indices of those that do."""
    messages, first = [*example["prompt"], *example["completion"]], len(example["prompt"])
    found = [i for i, message in enumerate(messages) if i >= first and message["role"] == ASSISTANT]
    return messages[: found[-1] + 1], found if example.turns == "all" else found[-1:]


def texts_of(example: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and completion as texts that name an example; those of a conversation do not depend on `turns`."""
    if not is_conversation(example):
        return example["prompt"], example.get("completion", "")  # questions of a test have prompts alone
    row = conversation(example)
    tools = f"{json.dumps(row[TOOLS], sort_keys=True, default=str)}\n" if TOOLS in row else ""
    return tools + _as_text(row["prompt"]), _as_text(row["completion"])


def described(example: Row) -> str:
    """How a message names a conversation: its place, or how it begins."""
    return example.place or f"the conversation that begins {_as_text(example['prompt'])[:60]!r}"


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _as_text(messages: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{m['role']}\n{m['content']}" if set(m) == {"role", "content"} else json.dumps(m, sort_keys=True, default=str)
        for m in messages
    )


def _from_share_gpt(turns: object) -> object:
    if not isinstance(turns, list | tuple):
        return turns
    return [
        {"role": _SHARE_GPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if isinstance(turn, Mapping) and isinstance(turn.get("from"), str)
        else turn
        for turn in turns
    ]


def _messages(value: object, column: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{_at(place)}{column} must be a list of messages with role and content, got {value!r:.60}")
    found = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{_at(place)}{column}, message {number}: role and content are needed, got {message!r:.60}"
            )
        # Parquet fills the keys that only other messages have with None.
        kept = {key: entry for key, entry in message.items() if entry is not None}
        if not isinstance(kept.get("content"), str) and "tool_calls" not in kept:
            raise ValueError(
                f"{_at(place)}{column}, message {number}: content must be a text, got {kept.get('content')!r:.60}"
            )
        found.append({"content": "", **kept})
    return found
