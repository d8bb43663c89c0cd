"""The systems that one pass of both models compares: pre-trained, warm start, SVDecode, its ablations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svdecode.calibration import Calibration
from svdecode.constants import KL, LOG_RATIO
from svdecode.ops import steered_nll

PRETRAINED, WARM_START = "pre-trained", "warm start"


@dataclass(frozen=True)
class System:
    """One way to combine the logits of both models; the settings of `svdecode.fused_steer`."""

    name: str
    mu: float = 0.0
    alpha: float = 1.0
    penalty: float = 0.0
    direction: str = KL
    pretrained: bool = False
    """The pre-trained model alone."""

    @property
    def settings(self) -> tuple[float, float, str]:
        """(alpha, penalty, direction): systems that share them are scored in one call."""
        return self.alpha, self.penalty, self.direction

    @property
    def key(self) -> list[object]:
        """What the system computes, for the header of a run."""
        penalty = "-inf" if self.penalty == -math.inf else self.penalty
        return [self.mu, self.alpha, penalty, self.direction]


def alone() -> list[System]:
    """Without an adapter."""
    return [System(PRETRAINED, pretrained=True)]


def compared(
    calibration: Calibration | float,
    *,
    alpha: float,
    penalty: float,
    direction: str,
    log_ratio_mu: float | None = None,
    ablations: bool = True,
) -> list[System]:
    """All systems for one adapter.

    SVDecode with each estimate of the calibration (or one given strength), and at the strength that the calibration
    chose two ablations of the paper:
    "no confidence mask" keeps every token (alpha = 0);
    "no logit-space projection" takes the KL gradient log p_ft - log p_pre + 1 without the softmax Jacobian. That is
    direction="log_ratio" without a constant (KL + 1) that would change nothing but the kept tokens' lead over the rest.

    Args:
        calibration: strengths, or one strength.
        alpha: confidence threshold.
        penalty: lambda <= 0 outside the kept set.
        direction: of SVDecode itself.
        log_ratio_mu: strength calibrated for direction="log_ratio", which becomes a system of its own; None for none.
        ablations: whether the two are among them.
    """
    settings = {"alpha": alpha, "penalty": penalty, "direction": direction}
    if isinstance(calibration, Calibration):
        strengths = {f"SVDecode ({name})": mu for name, mu in calibration.estimates.items()}
        chosen = calibration.mu
    else:
        chosen = float(calibration)
        strengths = {f"SVDecode (mu = {chosen:g})": chosen}
    systems = [*alone(), System(WARM_START, alpha=alpha, direction=direction)]
    systems += [System(name, mu, **settings) for name, mu in strengths.items()]
    if ablations and alpha > 0:
        systems.append(System("no confidence mask", chosen, 0.0, penalty, direction))
    if ablations and direction == KL:
        systems.append(System("no logit-space projection", chosen, alpha, penalty, LOG_RATIO))
    if log_ratio_mu is not None:
        systems.append(System("log_ratio", log_ratio_mu, alpha, penalty, LOG_RATIO))
    return systems


def nll_of(systems: list[System], pre: Tensor, ft: Tensor, labels: Tensor) -> Tensor:
    """(S, ...) float32, nats: the NLL of gold tokens under each system, from one pair of logits.

    Args:
        systems: S of them; those that differ in mu alone share one call of `svdecode.steered_nll`.
        pre: (..., V) logits of the pre-trained model.
        ft: (..., V) logits of the warm start.
        labels: (...) gold tokens, -100 ignored (NLL 0).
    """
    found = pre.new_empty((len(systems), *labels.shape), dtype=torch.float32)
    groups: dict[tuple, list[int]] = {}
    for index, system in enumerate(systems):
        groups.setdefault((system.pretrained, *system.settings), []).append(index)
    for (pretrained, alpha, penalty, direction), members in groups.items():
        mus = torch.tensor([systems[i].mu for i in members], device=pre.device)
        moved = pre if pretrained else ft
        nll = steered_nll(pre, moved, labels, mus, alpha=alpha, penalty=penalty, direction=direction)
        found[members] = nll.movedim(-1, 0)
    return found
