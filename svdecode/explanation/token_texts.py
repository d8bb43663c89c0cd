"""What each token adds to a text. A token has no text of its own: it may be half a letter, or lose its space at the start."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

CONTEXT = 8
"""Tokens in front that are decoded together with a token: enough for a letter of four bytes and the space before a word."""
REPLACEMENT = "\ufffd"
"""What tokenizers write for bytes that are no letter yet."""


class Token(NamedTuple):
    """One entry of the vocabulary at one place of a text."""

    id: int
    text: str
    """What it adds to the text in front of it: "" for a part of a letter, whose last token has the whole letter."""
    piece: str
    """Its name in the vocabulary; its id in brackets where there is no tokenizer or no name."""
    special: bool = False
    """Whether it is one of the tokenizer's special tokens, as the one that ends a text."""


class TokenTexts:
    """Tokens in front of which other tokens stand."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Without a tokenizer there are no texts, only ids."""
        self._tokenizer: Any = tokenizer
        self._special = frozenset() if tokenizer is None else frozenset(tokenizer.all_special_ids)

    def token(self, front: list[int], token: int) -> Token:
        """The token behind the tokens `front`."""
        if self._tokenizer is None:
            return Token(token, "", f"[{token}]")
        context = front[-CONTEXT:]
        before, after = self._decode(context).rstrip(REPLACEMENT), self._decode([*context, token])
        # Some tokenizers write a text anew when it goes on; then the token is decoded alone.
        text = after[len(before) :] if after.startswith(before) else self._decode([token])
        if text.endswith(REPLACEMENT):
            text = ""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return Token(token, text, piece or f"[{token}]", token in self._special)

    def tokens(self, front: list[int], added: list[int]) -> list[Token]:
        """The tokens `added` behind the tokens `front`, one after another."""
        whole = [*front, *added]
        return [self.token(whole[: len(front) + i], token) for i, token in enumerate(added)]

    def text(self, front: list[int], added: list[int]) -> str:
        """What `added` says behind `front`, without special tokens."""
        return "".join(token.text for token in self.tokens(front, added) if not token.special)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
