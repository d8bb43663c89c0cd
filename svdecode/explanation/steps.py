"""Greedy decoding that writes down what every step looked like: both models, and the steered distribution."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from svdecode.decoding.state import DecodingState
from svdecode.explanation.token_texts import Token, TokenTexts
from svdecode.ops.fused_steer import fused_steer
from svdecode.ops.reference import row_values
from svdecode.ops.steer_sample import steer_sample

if TYPE_CHECKING:
    from svdecode.models.steer import SteeredPreTrainedModel
    from svdecode.ops.setting import Setting

CANDIDATES = 6
"""The most probable tokens of each of the three distributions that a step lists."""


class Candidate(NamedTuple):
    """A token that could have come next, and its probability."""

    token: Token
    kept: bool
    """Whether it is in the kept set K."""
    pretrained: float
    warm_start: float
    steered: float


class Step(NamedTuple):
    """One generated token. Probabilities are over the whole vocabulary, given the prompt and the steered tokens so far."""

    chosen: Candidate
    """What greedy decoding from the steered distribution took."""
    without: Candidate
    """What the warm start alone would have taken here."""
    kl: float
    """KL(warm start || pre-trained) in nats; inf where the pre-trained model excludes a token."""
    num_kept: int
    """Size of the kept set K."""
    candidates: list[Candidate]
    """The most probable tokens of each distribution, by their steered probability, then by the warm start's."""

    @property
    def changed(self) -> bool:
        """Whether steering took another token than the warm start would have taken."""
        return self.chosen.token.id != self.without.token.id

    @property
    def moved(self) -> float:
        """Steered probability of the chosen token minus that of the warm start."""
        return self.chosen.steered - self.chosen.warm_start


@contextlib.contextmanager
def setting_of(steered: SteeredPreTrainedModel, setting: Setting) -> Iterator[None]:
    """Another setting for a while."""
    own = steered.settings
    steered.settings = setting
    try:
        yield
    finally:
        steered.settings = own


def greedy_steps(
    steered: SteeredPreTrainedModel, ids: Tensor, texts: TokenTexts, max_new_tokens: int, ends: list[int]
) -> list[Step]:
    """The steps of a greedy answer.

    Args:
        steered: a steered model.
        ids: (1, T) int64, the prompt, on the model's device.
        texts: of the model's tokenizer.
        max_new_tokens: at most so many steps.
        ends: tokens that end the answer; the one that did is the last step.

    Raises:
        RuntimeError: the logits of a step are NaN or +inf.
    """
    setting = steered.settings
    # With a finite penalty the pre-trained model runs at every step in all modes: a step that keeps one token is shown too.
    both = setting if setting.penalty > -math.inf else setting._replace(penalty=-1.0)
    state = DecodingState(steered, ids, None, max_new_tokens, pad=0)
    steps: list[Step] = []
    for _ in range(max_new_tokens):
        with setting_of(steered, both):
            pre, ft = state.next_logits()
        token, _ = steer_sample(pre, ft, setting.mu, temperature=0.0, **setting.keywords)
        if token.item() < 0:
            raise RuntimeError("the logits of a step are NaN or +inf: no token can be chosen")
        # The choice of the same loop at mu = 0, where ties go to the lowest id too.
        without, _ = steer_sample(pre, ft, 0.0, temperature=0.0, **setting.keywords)
        front = state.tokens[0, : state.end].tolist()
        steps.append(_step(pre[0], ft[0], (int(token), int(without)), setting, texts, front))
        state.append(token)
        if steps[-1].chosen.token.id in ends:
            break
    return steps


def _step(
    pre: Tensor, ft: Tensor, taken: tuple[int, int], setting: Setting, texts: TokenTexts, front: list[int]
) -> Step:
    """One step from the two models' logits (V,) and the tokens that are taken with steering and without."""
    chosen, without = taken
    out = fused_steer(pre, ft, setting.mu, **setting.keywords)
    kept = row_values(pre, ft, setting.alpha, setting.direction).kept
    distributions = torch.stack([pre.float().softmax(-1), ft.float().softmax(-1), out.logprobs.exp()])
    top = distributions.topk(min(CANDIDATES, len(ft)), dim=-1).indices.flatten().tolist()
    listed = torch.tensor(list(dict.fromkeys([chosen, without, *top])), device=ft.device)
    rows = [
        Candidate(texts.token(front, entry), bool(inside), *probabilities)
        for entry, inside, probabilities in zip(
            listed.tolist(), kept[listed].tolist(), distributions[:, listed].T.tolist(), strict=True
        )
    ]
    assert out.kl is not None  # it was asked for
    return Step(
        chosen=rows[0],
        without=rows[0] if without == chosen else rows[1],
        kl=out.kl.item(),
        num_kept=int(out.num_kept),
        candidates=sorted(rows, key=lambda row: (-row.steered, -row.warm_start, -row.pretrained)),
    )
