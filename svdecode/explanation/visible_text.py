"""Text of a model as text that a reader can see whole: nothing hidden, nothing that turns its neighbours around."""

from __future__ import annotations

import unicodedata

from svdecode.explanation.token_texts import Token

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode's categories of controls (bidirectional ones too), surrogates, unassigned characters and separators of lines."""
_JOINERS = ("\u200c", "\u200d")
"""Parts of ordinary words and emoji, where they stand between other characters."""
DOTTED_CIRCLE = "\u25cc"
SPACE, LINE_BREAK, TAB = "\u2423", "\u21b5", "\u21e5"
"""Signs that stand for white space."""


def visible(text: str) -> str:
    """The text with hidden characters as U+ and their number in brackets; line breaks and tabs stay."""
    joins = len(text) > 1
    return "".join(
        letter if letter in "\n\t" or (joins and letter in _JOINERS) or not _is_hidden(letter) else _named(letter)
        for letter in text
    )


def spelled(text: str) -> str:
    """The text of one token with every kind of white space visible too."""
    signs = {" ": SPACE, "\n": LINE_BREAK, "\t": TAB}
    shown = "".join(
        signs.get(letter) or (_named(letter) if _is_hidden(letter) or letter.isspace() else letter) for letter in text
    )
    return DOTTED_CIRCLE + shown if text and unicodedata.category(text[0]).startswith("M") else shown


def label(token: Token) -> str:
    """A token by itself, as one name that is never empty."""
    return spelled(token.text) if token.text else f"\u27e8{spelled(token.piece)}\u27e9"


def _is_hidden(letter: str) -> bool:
    return unicodedata.category(letter) in _HIDDEN


def _named(letter: str) -> str:
    return f"\u27e8U+{ord(letter):04X}\u27e9"
