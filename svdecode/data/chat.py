"""Conversations as token ids by the tokenizer's chat template, with the tokens of the assistant's turns known exactly.

The conversation is rendered as it is served: before each assistant turn with the template's generation prompt. What the
rendering adds from there to the end of the turn, its end-of-turn token included, is what the model would have to generate.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from svdecode.constants import IGNORE_INDEX
from svdecode.data.conversations import ASSISTANT, TOOLS, Row, conversation, described, is_conversation, labelled_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]
"""Begin and end of each turn, in characters or in tokens."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks the assistant's turns for transformers."""

_PROBE = "svdecode"


def encode_conversation(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of a conversation up to its last labelled turn, and labels that ignore all but the labelled turns.

    Nothing is added to what the template gives: no beginning-of-sequence and no end-of-sequence token.

    Raises:
        ValueError: what `labelled_tokens` raises.
    """
    ids, turns = labelled_tokens(example, tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    for begin, end in turns:
        labels[begin:end] = ids[begin:end]
    return {"input_ids": ids, "labels": labels}


def labelled_tokens(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Spans]:
    """Token ids of a conversation, and the begin and end of each labelled turn among them.

    Args:
        example: a row in one of the layouts of `svdecode.data.conversations.conversation`.
        tokenizer: with a chat template.

    Raises:
        ValueError: no chat template, one that refuses the conversation or does not show where its assistant's turns are, or a
            tokenizer that does not give a turn's text back.
    """
    check_template(tokenizer)
    row = conversation(example)
    messages, labelled = labelled_turns(row)
    text = render(tokenizer, messages, tools=row.get(TOOLS), name=described(row))
    spans = _spans(tokenizer, row, text, messages, labelled)
    if spans is None:
        return _by_mask(tokenizer, row, messages, labelled)
    for ids, turns in _tokenised(tokenizer, text, spans):
        if _decode_to(tokenizer, ids, turns, [text[begin:end] for begin, end in spans]):
            return ids, turns
    raise ValueError(f"{described(row)}: the tokens of an assistant's turn do not decode to its text")


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer {name} has no chat template, which chat data and --chat need: take the tokenizer of a chat model, "
            "or save it with a template (tokenizer.chat_template) beside the adapter or the model"
        )


def check_conversations(examples: Iterable[object], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise what encoding the conversations among some examples would raise; for commands, before a model is loaded."""
    for example in examples:
        if is_conversation(example):
            labelled_tokens(example, tokenizer)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    answer: bool = False,
    tools: Any = None,
    name: str = "this conversation",
) -> str:
    """Messages as a text by the chat template.

    Args:
        tokenizer: with a chat template.
        messages: {"role", "content"} each.
        answer: whether the generation prompt, after which the assistant answers, is added.
        tools: for the template.
        name: what the error calls the conversation.

    Raises:
        ValueError: the template refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer)
    except ImportError:
        raise
    except Exception as error:  # a template is a program of others, which raises what it likes
        raise ValueError(f"{name}: the chat template refuses it: {str(error) or type(error).__name__}") from None


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
    """Text and token ids of messages with the generation prompt; ValueError as in `render`, and without a template."""
    check_template(tokenizer)
    text = render(tokenizer, messages, answer=True)
    return text, tokenizer(text, add_special_tokens=False).input_ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token with which the chat template ends an assistant turn; empty where that is none of the added tokens."""
    text = render(tokenizer, [{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": _PROBE}])
    after = text[text.rindex(_PROBE) + len(_PROBE) :].strip() if _PROBE in text else ""
    return [token for token in tokenizer(after, add_special_tokens=False).input_ids[:1] if _is_added(tokenizer, token)]


def _is_added(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder


def _spans(
    tokenizer: PreTrainedTokenizerBase, row: Row, text: str, messages: list, labelled: list[int]
) -> Spans | None:
    """Begin and end of the labelled turns in the rendered text; None where the renderings do not continue one another."""
    found = []
    for index in labelled:
        try:
            before = render(tokenizer, messages[:index], answer=True, tools=row.get(TOOLS))
            whole = render(tokenizer, messages[: index + 1], tools=row.get(TOOLS)).rstrip()
        except ValueError:
            return None
        if len(whole) <= len(before) or not whole.startswith(before) or not text.startswith(whole):
            return None
        found.append((len(before), len(whole)))
    return found


def _tokenised(tokenizer: PreTrainedTokenizerBase, text: str, spans: Spans) -> Iterable[tuple[list[int], Spans]]:
    """The text as token ids with the turns in them: as a whole, and then with the turns as texts of their own.

    The second way is for a token that would straddle the border of a turn. It is also what the model meets when it answers,
    since the generation prompt is then tokenised alone.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        turns = _inside(encoded["offset_mapping"], spans)
        if turns is not None:
            yield encoded["input_ids"], turns
    ids: list[int] = []
    turns = []
    borders = [0, *itertools.chain.from_iterable(spans), len(text)]
    for number, (begin, end) in enumerate(itertools.pairwise(borders)):
        start = len(ids)
        ids += tokenizer(text[begin:end], add_special_tokens=False).input_ids
        if number % 2:
            turns.append((start, len(ids)))
    yield ids, turns


def _inside(offsets: Sequence[tuple[int, int]], spans: Spans) -> Spans | None:
    """The tokens of each span of characters; None where a token straddles a border or a span has no token."""
    found = []
    for begin, end in spans:
        if any(first < border < last for first, last in offsets for border in (begin, end)):
            return None
        inside = [i for i, (first, last) in enumerate(offsets) if begin <= first < end and last <= end]
        if not inside:
            return None
        found.append((inside[0], inside[-1] + 1))
    return found


def _decode_to(tokenizer: PreTrainedTokenizerBase, ids: list[int], turns: Spans, texts: list[str]) -> bool:
    return all(_same(_decoded(tokenizer, ids, turn), text) for turn, text in zip(turns, texts, strict=True))


def _same(one: str, other: str) -> bool:
    # Some tokenizers bring accents and widths of letters into a normal form.
    return unicodedata.normalize("NFKC", one) == unicodedata.normalize("NFKC", other)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], turn: tuple[int, int]) -> str:
    """What some tokens add to the text before them: decoded alone, they can lose a space at their beginning."""
    before, whole = (
        tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False) for end in turn
    )
    return whole.removeprefix(before)


def _by_mask(
    tokenizer: PreTrainedTokenizerBase, row: Row, messages: list, labelled: list[int]
) -> tuple[list[int], Spans]:
    """Token ids and labelled turns as the template marks them for transformers; ValueError where it does not."""
    unclear = ValueError(
        f"{described(row)}: the chat template does not show where the assistant's turns are: the rendering of the first turns "
        "is not the beginning of that of all. Try --turns last, or mark the turns in the template with {% generation %}"
    )
    if not _GENERATION.search(tokenizer.get_chat_template(tools=row.get(TOOLS))):
        raise unclear
    found = tokenizer.apply_chat_template(
        messages, tools=row.get(TOOLS), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(found["input_ids"]), found["assistant_masks"]
    edges = [i for i, (a, b) in enumerate(itertools.pairwise([0, *mask, 0])) if a != b]
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    spoken = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if len(runs) != len(spoken):
        raise unclear
    turns = [run for run, index in zip(runs, spoken, strict=True) if index in labelled]
    texts = [unicodedata.normalize("NFKC", messages[index]["content"].strip()) for index in labelled]
    decoded = [unicodedata.normalize("NFKC", _decoded(tokenizer, ids, turn)) for turn in turns]
    if not all(text in found for text, found in zip(texts, decoded, strict=True)):
        raise ValueError(f"{described(row)}: what the chat template marks is not the text of the assistant's turns")
    return ids, turns
