"""Tokens, hidden characters and numbers as a reader of an explanation sees them."""

from __future__ import annotations

import math

from explanations import byte_tokenizer, hostile_explanation
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from svdecode.explanation import numbers
from svdecode.explanation.token_texts import TokenTexts
from svdecode.explanation.visible_text import label, spelled, visible


def test_a_letter_of_several_tokens_belongs_to_the_last_of_them():
    tokenizer = byte_tokenizer()
    front, text = tokenizer("a").input_ids, "é 🙂\n"
    tokens = TokenTexts(tokenizer).tokens(front, tokenizer(text).input_ids)
    assert [token.text for token in tokens] == ["", "é", " ", "", "", "", "🙂", "\n"]
    assert all(token.piece for token in tokens)


def test_a_word_keeps_the_space_that_its_tokenizer_strips_at_the_start():
    words = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "s": 2, "<eos>": 3}, unk_token="<eos>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    texts = TokenTexts(tokenizer)
    assert [token.text for token in texts.tokens([0], [1, 2, 0, 3])] == [" two", "s", " one", "<eos>"]
    assert texts.text([0], [1, 2, 0, 3]) == " twos one"
    assert texts.token([0], 3).special


def test_hidden_characters_are_named_and_nothing_else_changes():
    assert visible("a\u202eb\x00\u2028") == "a\u27e8U+202E\u27e9b\u27e8U+0000\u27e9\u27e8U+2028\u27e9"
    assert visible("na\u00efve \u05de\u05d9\u05dd\n\t\U0001f642") == "na\u00efve \u05de\u05d9\u05dd\n\t\U0001f642"
    assert spelled(" a\n\u00a0\u0301") == "\u2423a\u21b5\u27e8U+00A0\u27e9\u0301"
    assert spelled("\u0301") == "\u25cc\u0301"
    assert all(label(step.chosen.token) for step in hostile_explanation().steps)


def test_numbers_do_not_look_like_others():
    assert [numbers.probability(value) for value in (0.0, 1e-5, 0.0005, 0.5, 0.9997, 1.0)] == [
        "0", "<0.001", "0.001", "0.500", ">0.999", "1",
    ]  # fmt: skip
    assert [numbers.change(value) for value in (0.25, -0.25, -1e-6)] == ["+0.250", "\u22120.250", "0.000"]
    assert [numbers.nats(value) for value in (0.0, 1e-5, 2.0, math.inf)] == ["0.000", "<0.001", "2.000", "infinite"]
    assert [numbers.level(value, numbers.MOVED_LEVELS) for value in (0.0, 0.01, -0.3, 1.0, -1.0)] == [0, 1, -4, 5, -5]
