"""What remains to choose from where a mask forbids every kept token."""

from __future__ import annotations

import math

from torch import Tensor

FLOOR_GAP = 1000.0
"""Nats between a row's least likely kept token and its most likely token outside K, at least.

No draw sees it: exp(-FLOOR_GAP / temperature) is 0 in float32 up to a temperature of 9; above 1, `generate()`
multiplies it by the temperature. Float32 still orders log-probabilities of this size to 1e-4 nats."""


def with_floor(logprobs: Tensor, logits_ft: Tensor, gap: float = FLOOR_GAP) -> Tensor:
    """(..., V) float32 scores: steered log-probabilities, and below them the adapted model's order of the tokens outside K.

    With a penalty of -inf, a token outside K has the log-probability -inf. A mask that comes later (a grammar, a list of
    allowed tokens, a minimum length) may forbid every kept token and so leave a row without a choice. Here a token v
    outside K has the score

        min over k in K of logprobs[k]  -  gap  +  log_softmax(logits_ft)[v]

    While one kept token is allowed, greedy choice, draws and the order of beams are those of `logprobs`. Where none is,
    the adapted model's distribution over the allowed tokens decides.

    Args:
        logprobs: (..., V) float32 steered log-probabilities in nats, as `fused_steer` returns them. Not written to.
        logits_ft: (..., V) logits of the adapted model.
        gap: nats between the kept tokens and the others, at least.

    A row of NaN stays NaN, a token with the adapted logit -inf stays at -inf, and with a finite penalty nothing changes.
    """
    outside = logprobs == -math.inf
    least_kept = logprobs.masked_fill(outside, math.inf).amin(-1, keepdim=True)
    return logprobs.where(~outside, logits_ft.float().log_softmax(-1).add_(least_kept - gap))
