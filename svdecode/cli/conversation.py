"""`svdecode generate --chat`: one answer under the chat template, or a conversation line by line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from svdecode.common.files import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

_QUESTION = "> "
"""Shown before each line in a terminal."""


class Answer(NamedTuple):
    """What was generated."""

    text: str
    new_tokens: int
    interrupted: bool


Decode = Callable[[list[int], Any], list[int]]
"""(prompt tokens, streamer or None) -> the new tokens; a streamer sees them as they come."""


def first_messages(system: str | None) -> list[dict[str, str]]:
    """What a conversation begins with: a system turn, where there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


class _Printer:
    """A streamer that remembers tokens and prints their text as soon as its letters are whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: bool) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.tokens: list[int] | None = None  # None until the prompt has come
        self.shown = ""

    def put(self, tokens: Any) -> None:
        """Take the prompt first, then each step's token."""
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += tokens.flatten().tolist()
        self._print(self.text())

    def text(self) -> str:
        """All that was generated."""
        return self.tokenizer.decode(self.tokens or [], skip_special_tokens=True)

    def end(self) -> None:
        """Print what is left."""
        self._print(self.text(), whole=True)

    def _print(self, text: str, whole: bool = False) -> None:
        # A letter of several tokens is U+FFFD until its last one.
        if self.show and text.startswith(self.shown) and (whole or not text.endswith("\ufffd")):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


def answer(decode: Decode, tokenizer: PreTrainedTokenizerBase, ids: list[int], *, show: bool) -> Answer:
    """Decode one answer, printed token by token with `show`; Ctrl-C ends it and keeps what is there."""
    printer, interrupted = _Printer(tokenizer, show), False
    try:
        decode(ids, printer)
    except KeyboardInterrupt:
        interrupted = True
        printer.end()
    if show:
        print(flush=True)
    return Answer(printer.text(), len(printer.tokens or ()), interrupted)


def talk(
    decode: Decode,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    prompt: Callable[[list[dict[str, str]]], list[int]],
    *,
    as_json: bool,
) -> None:
    """Answer the lines of stdin, each after the whole conversation before it, until stdin ends.

    In a terminal Ctrl-C ends an answer, and at the question the program. In a pipe it ends the program.

    Args:
        decode: generates.
        tokenizer: of the model.
        messages: what the conversation begins with; turns are added to it.
        prompt: token ids of messages with the generation prompt.
        as_json: one object per answer on stdout, in place of the text.
    """
    for line in _lines():
        messages.append({"role": "user", "content": line})
        ids = prompt(messages)
        found = answer(decode, tokenizer, ids, show=not as_json)
        messages.append({"role": "assistant", "content": found.text})
        if as_json:
            counts = {"prompt_tokens": len(ids), "new_tokens": found.new_tokens}
            print(to_json({"prompt": line, "answer": found.text, **counts}), flush=True)
        if found.interrupted and not sys.stdin.isatty():
            raise typer.Exit(INTERRUPTED)


def _lines() -> Iterator[str]:
    """Lines that are not empty, without their ends; Ctrl-C while one is awaited ends the program."""
    while True:
        try:
            if sys.stdin.isatty():
                print(_QUESTION, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"the line on stdin is not UTF-8 text: {error.reason}") from None
        if not line:
            return
        if line.strip():
            yield line.strip("\r\n")
