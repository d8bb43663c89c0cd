"""`explain`: a greedy answer with what steering did at each of its steps."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svdecode.common.files import write_atomically
from svdecode.data.batches import prompt_ids
from svdecode.decoding.generate import end_tokens, generate
from svdecode.explanation.page import page
from svdecode.explanation.steps import Candidate, Step, greedy_steps, setting_of
from svdecode.explanation.token_texts import Token, TokenTexts
from svdecode.models.reach import most_positions
from svdecode.models.steered_model import SteeredModel
from svdecode.ops import validation
from svdecode.ops.setting import Setting

if TYPE_CHECKING:
    from svdecode.models.steer import SteeredPreTrainedModel

FRAME_HEIGHT = 760
"""Of the page in a notebook, in CSS pixels."""


@dataclass(frozen=True, repr=False)
class Explanation:
    """A greedy answer, step by step, and the answer that the warm start gives alone."""

    prompt: str
    """As text; "" where only ids were given, without a tokenizer."""
    prompt_ids: list[int]
    answer: str
    """What the steered model says, without special tokens."""
    steps: list[Step]
    """One for each generated token, the one that ended the answer included."""
    unsteered_answer: str
    """The greedy answer at mu = 0."""
    unsteered: list[Token]
    """Its tokens."""
    setting: Setting
    mode: str
    """How both models were run; see `svdecode.steer`."""
    model: str
    """The model's name, or its class."""
    vocabulary: int
    """Tokens that each distribution is over."""

    @property
    def token_ids(self) -> list[int]:
        """Of the steered answer, what `steered.generate(..., do_sample=False)` adds to the prompt."""
        return [step.chosen.token.id for step in self.steps]

    @property
    def changed_steps(self) -> list[int]:
        """The steps, counted from 1, at which the warm start would have taken another token."""
        return [number for number, step in enumerate(self.steps, 1) if step.changed]

    @property
    def first_difference(self) -> int | None:
        """The first step, counted from 1, at which the two answers differ; None where they are the same."""
        ours, theirs = self.token_ids, [token.id for token in self.unsteered]
        for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
            if one != other:
                return number
        return None if len(ours) == len(theirs) else min(len(ours), len(theirs)) + 1

    def summary(self) -> str:
        """One sentence: at how many steps steering changed the choice."""
        count, total = len(self.changed_steps), len(self.steps)
        if not count:
            return f"Steering changed the choice at none of {total} steps: the answer is the warm start's."
        where = f"at step {self.changed_steps[0]}" + (" first" if count > 1 else "")
        return f"Steering changed the choice at {count} of {total} steps, {where}."

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as plain values: probabilities in [0, 1], KL in nats (`float("inf")` where it is infinite).

        `svdecode.common.files.to_json` writes it as strict JSON, with infinite numbers as "inf" and "-inf".
        """
        return {
            "model": self.model,
            **self.setting._asdict(),
            "mode": self.mode,
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            "answer": self.answer,
            "token_ids": self.token_ids,
            "unsteered": {"answer": self.unsteered_answer, "tokens": [token._asdict() for token in self.unsteered]},
            "first_difference": self.first_difference,
            "changed_steps": self.changed_steps,
            "vocabulary": self.vocabulary,
            "steps": [_step(number, step) for number, step in enumerate(self.steps, 1)],
        }

    def to_html(self, path: str | Path) -> Path:
        """Write the page: one file that needs no other, no network and no server. An existing file is replaced.

        Raises:
            OSError: the file cannot be written; nothing is left behind.
        """
        write_atomically(path, page(self).encode())
        return Path(path)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that it and the notebook do not change one another's style."""
        return (
            f'<iframe title="svdecode: a steered answer, step by step" sandbox="allow-scripts" '
            f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 0" srcdoc="{html.escape(page(self))}"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Explanation({len(self.steps)} steps, changed {self.changed_steps}, mu={self.setting.mu:.4g})"


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {**candidate.token._asdict(), **{name: getattr(candidate, name) for name in Candidate._fields[1:]}}


def _step(number: int, step: Step) -> dict[str, Any]:
    return {
        "step": number,
        "chosen": _candidate(step.chosen),
        "without": _candidate(step.without),
        "changed": step.changed,
        "moved": step.moved,
        "kl": step.kl,
        "num_kept": step.num_kept,
        "candidates": [_candidate(candidate) for candidate in step.candidates],
    }


@torch.inference_mode()
def explain(
    steered: SteeredPreTrainedModel,
    prompt_or_ids: str | list[int] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_new_tokens: int = 64,
) -> Explanation:
    """Answer a prompt greedily, and keep what both models and the steered distribution said at each step.

    The tokens are those of `steered.generate(..., do_sample=False)` and of `svdecode.generate`, in every mode. In mode "lazy"
    the pre-trained model runs at every step here. The warm start alone (mu = 0) answers the prompt too.

    Args:
        steered: what `svdecode.steer` returns. Its settings are used, and are as they were afterwards.
        prompt_or_ids: one prompt, as text or as token ids: a list, or a tensor (T,) or (1, T) of int64.
        tokenizer: the model's. Needed for a text; without it ids stand for the tokens.
        max_new_tokens: both answers end after so many tokens, or where the model's generation config ends them.

    Raises:
        TypeError: `steered` is no steered model, or an argument has a wrong type.
        ValueError: an empty prompt, more than one prompt, ids outside the vocabulary, a text without a tokenizer, or more
            tokens than the model has positions.
    """
    if not isinstance(steered, SteeredModel):
        raise TypeError(f"steered must come from svdecode.steer, got {type(steered).__name__}")
    validation.check_count("max_new_tokens", max_new_tokens)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}")
    vocabulary = steered.config.get_text_config(decoder=True).vocab_size
    prompt = _prompt_ids(prompt_or_ids, tokenizer, vocabulary)
    limit = most_positions(steered)
    if limit is not None and len(prompt) + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {len(prompt)} tokens is more than the model's {limit} "
            "positions: shorten the prompt or lower max_new_tokens"
        )
    texts = TokenTexts(tokenizer)
    ids = torch.tensor([prompt], device=steered.device)
    setting = steered.settings
    steps = greedy_steps(steered, ids, texts, max_new_tokens, end_tokens(steered))
    with setting_of(steered, setting._replace(mu=0.0)):
        plain = generate(steered, ids, max_new_tokens=max_new_tokens)[0, len(prompt) :].tolist()
    text = prompt_or_ids if isinstance(prompt_or_ids, str) else "" if tokenizer is None else tokenizer.decode(prompt)
    return Explanation(
        prompt=str(text),
        prompt_ids=prompt,
        answer=texts.text(prompt, [step.chosen.token.id for step in steps]),
        steps=steps,
        unsteered_answer=texts.text(prompt, plain),
        unsteered=texts.tokens(prompt, plain),
        setting=setting,
        mode=steered.mode,
        model=Path(getattr(steered.config, "name_or_path", "")).name or type(steered).__name__,
        vocabulary=vocabulary,
    )


def _prompt_ids(given: Any, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> list[int]:
    """The prompt's tokens, checked."""
    if isinstance(given, str):
        if tokenizer is None:
            raise ValueError("a prompt as text needs its tokenizer: pass tokenizer=, or token ids")
        ids = prompt_ids(given, tokenizer) if given else []
    elif isinstance(given, Tensor):
        if given.dim() not in (1, 2) or (given.dim() == 2 and len(given) != 1) or given.dtype != torch.long:
            raise ValueError(
                f"prompt_or_ids must be one prompt, int64 of shape (T,) or (1, T), got {given.dtype} of shape "
                f"{tuple(given.shape)}"
            )
        ids = given.flatten().tolist()
    elif isinstance(given, list) and all(isinstance(entry, int) for entry in given):
        ids = given
    else:
        raise TypeError(f"prompt_or_ids must be a text, a list of token ids or a tensor, got {type(given).__name__}")
    if not ids:
        raise ValueError("prompt_or_ids is an empty prompt")
    outside = next((entry for entry in ids if not 0 <= entry < vocabulary), None)
    if outside is not None:
        raise ValueError(f"prompt_or_ids has the token {outside}, which is outside the vocabulary of {vocabulary}")
    return list(ids)
