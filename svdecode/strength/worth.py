"""What steering is worth in training steps: how far plain training must go for the NLL that a steered checkpoint has.

The warm start's own NLL over its checkpoints is a curve, taken as linear in log(1 + steps) between two of them. It is never
continued: a value below the whole curve takes more steps than the last checkpoint has, whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svdecode.strength.bootstrap import ratio_draws


def worths(
    steps: Sequence[int], warm: Sequence[Tensor], steered: Sequence[Tensor], seed: int = 0
) -> list[dict[str, Any]]:
    """What steering is worth at each of C checkpoints, in steps of the plain warm start.

    Args:
        steps: of the checkpoints, rising.
        warm: C times (S, 2) float64: each sequence's NLL under the warm start, summed over its tokens, and their number. The
            same sequences in the same order for each checkpoint.
        steered: likewise, steered.
        seed: of the bootstrap, which draws sequences, the same ones for all checkpoints.

    Returns:
        One for each checkpoint: "steps", the fewest at which the plain warm start has the NLL of the steered checkpoint (inf:
        more than the last checkpoint has, 0: fewer than the first has); "interval" (95%; such ends too; None with a single
        sequence); "text", both in words.
    """
    at = torch.tensor(steps, dtype=torch.float64)
    curve, targets = _means(warm), _means(steered)
    found = [equivalent_steps(at, curve[None], target[None]).item() for target in targets]
    if len(warm[0]) < 2:
        return [{"steps": one, "interval": None, "text": worth_text(one, None, steps)} for one in found]
    drawn, drawn_targets = _draws(warm, seed), _draws(steered, seed)
    rows = []
    for place, one in enumerate(found):
        draws = equivalent_steps(at, drawn, drawn_targets[:, place])
        # An end is one of the draws: between a number and infinity there is no value.
        ends = [
            draws.quantile(0.025, interpolation="lower").item(),
            draws.quantile(0.975, interpolation="higher").item(),
        ]
        rows.append({"steps": one, "interval": ends, "text": worth_text(one, ends, steps)})
    return rows


def equivalent_steps(steps: Tensor, curve: Tensor, target: Tensor) -> Tensor:
    """(R,) float64: the fewest steps at which each curve comes down to its target.

    Args:
        steps: (C,) float64, rising.
        curve: (R, C) float64, the NLL at these steps.
        target: (R,) float64.

    Returns:
        inf where the curve stays above the target, 0 where it begins below it.
    """
    reached = curve <= target[:, None]
    place = reached.int().argmax(1)
    right = place.clamp(min=min(1, len(steps) - 1))
    left = (right - 1).clamp(min=0)
    above, below = (curve.gather(1, side[:, None]).squeeze(1) for side in (left, right))
    share = torch.where(above > below, (above - target) / (above - below), 0.0)
    at = steps.log1p()
    found = torch.expm1(at[left] + share * (at[right] - at[left]))
    first = torch.where(curve[:, 0] == target, steps[0], 0.0)
    return torch.where(reached.any(1), torch.where(place == 0, first, found), math.inf)


def worth_text(value: float, interval: Sequence[float] | None, steps: Sequence[int]) -> str:
    """In words: "20.4 [18.9, 22.3]", "more than 48 [31.2, more than 48]"."""

    def word(one: float) -> str:
        if one == 0:
            return f"fewer than {steps[0]}"
        return f"more than {steps[-1]}" if math.isinf(one) else f"{one:.{1 if one < 100 else 0}f}"

    return word(value) + ("" if interval is None else f" [{', '.join(word(end) for end in interval)}]")


def _means(pairs: Sequence[Tensor]) -> Tensor:
    """(C,) mean NLL of each."""
    return torch.stack([pair[:, 0].sum() / pair[:, 1].sum() for pair in pairs])


def _draws(pairs: Sequence[Tensor], seed: int) -> Tensor:
    """(draws, C): one seed draws the same sequences for all."""
    return torch.stack([ratio_draws(*pair.unbind(1), seed) for pair in pairs], 1)
