"""The systems that a run compares (pre-trained, warm start, SVDecode, its ablations), their names and their baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from svdecode.common.files import plain
from svdecode.constants import ALPHA, KL, LOG_RATIO, PENALTY
from svdecode.evaluation.tasks.base import TEXT, Task
from svdecode.models.adapters import adapter_fingerprint
from svdecode.ops.setting import Setting
from svdecode.ops.steered_nll import steered_nll
from svdecode.strength.calibration import Calibration, saved_calibration

PRETRAINED, WARM_START = "pre-trained", "warm start"


@dataclass(frozen=True)
class System:
    """One way to combine the logits of both models."""

    name: str
    setting: Setting | None
    """None for the pre-trained model alone."""

    @property
    def pretrained(self) -> bool:
        """Whether it is the pre-trained model alone."""
        return self.setting is None

    @property
    def key(self) -> list[object] | None:
        """What the system computes, for the header of a run."""
        return None if self.setting is None else plain(list(self.setting))


def alone() -> list[System]:
    """Without an adapter."""
    return [System(PRETRAINED, None)]


def compared(
    calibration: Calibration | float,
    family: Setting,
    *,
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
        family: alpha, penalty and direction of SVDecode itself; its mu is not read.
        log_ratio_mu: strength calibrated for direction="log_ratio", which becomes a system of its own; None for none.
        ablations: whether the two are among them.
    """
    if isinstance(calibration, Calibration):
        strengths = {f"SVDecode ({name})": mu for name, mu in calibration.estimates.items()}
        chosen = calibration.mu
    else:
        chosen = float(calibration)
        strengths = {f"SVDecode (mu = {chosen:g})": chosen}
    at = family._replace(mu=chosen)
    systems = [*alone(), System(WARM_START, family._replace(mu=0.0, penalty=0.0))]
    systems += [System(name, family._replace(mu=mu)) for name, mu in strengths.items()]
    if ablations and family.alpha > 0:
        systems.append(System("no confidence mask", at._replace(alpha=0.0)))
    if ablations and family.direction == KL:
        systems.append(System("no logit-space projection", at._replace(direction=LOG_RATIO)))
    if log_ratio_mu is not None:
        systems.append(System("log_ratio", family._replace(mu=log_ratio_mu, direction=LOG_RATIO)))
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
    groups: dict[Setting | None, list[int]] = {}
    for index, system in enumerate(systems):
        family = None if system.setting is None else system.setting._replace(mu=0.0)
        groups.setdefault(family, []).append(index)
    for family, members in groups.items():
        # A pair of equal logits has no direction: it is the pre-trained model.
        moved, family = (pre, Setting(0.0, 1.0, 0.0)) if family is None else (ft, family)
        mus = torch.tensor([0.0 if (s := systems[i].setting) is None else s.mu for i in members], device=pre.device)
        nll = steered_nll(pre, moved, labels, mus, **family.keywords)
        found[members] = nll.movedim(-1, 0)
    return found


def select_systems(
    task: Task,
    model: object,
    pretrained: object | None,
    mu: float | Calibration | None,
    log_ratio_mu: float | None,
    alpha: float | None,
    penalty: float | None,
    estimators: Sequence[str] | None,
    ablations: bool,
) -> list[System]:
    """The systems of a run, all checked; arguments as in `svdecode.evaluation.run.evaluate`."""
    if not isinstance(model, PeftModel) and pretrained is None:
        if mu is not None:
            raise ValueError("mu needs an adapter: the pre-trained model alone has nothing to steer with")
        return alone()
    scored = task.how != TEXT
    fingerprint = adapter_fingerprint(model)
    strength = saved_calibration(fingerprint) if mu is None else mu
    if isinstance(strength, Calibration):
        family = strength.setting_for(fingerprint, alpha=alpha)
        own = (
            strength.penalty if strength.penalty is not None and (not scored or strength.penalty > -math.inf) else None
        )
        strength = _chosen_estimates(strength, estimators)
    elif estimators is not None:
        raise ValueError("estimators need a calibration, not a number as mu")
    else:
        family, own = Setting(strength, ALPHA if alpha is None else alpha), None
    usual = own if own is not None else 0.0 if scored else PENALTY
    family = family._replace(penalty=usual if penalty is None else penalty).check()
    if scored and family.penalty == -math.inf:
        raise ValueError(
            "penalty must be finite where whole answers are scored: every token outside the kept set is -inf"
        )
    return compared(strength, family, log_ratio_mu=log_ratio_mu, ablations=ablations)


def _chosen_estimates(calibration: Calibration, names: Sequence[str] | None) -> Calibration:
    """The calibration with some of its estimates alone."""
    if names is None:
        return calibration
    unknown = [name for name in names if name not in calibration.estimates]
    if unknown or not names:
        raise ValueError(
            f"estimators must be among {', '.join(calibration.estimates)}, got {', '.join(names) or 'none'}"
        )
    values = {**vars(calibration), "estimates": {name: calibration.estimates[name] for name in names}}
    return type(calibration)(**values)


def named(task: Task, systems: list[System], decodings: Sequence[str]) -> dict[str, tuple[System, str | None]]:
    """What is compared, by name: systems, and where there are several decodings each with each."""
    if task.how != TEXT or len(decodings) == 1:
        return {system.name: (system, decodings[0]) for system in systems}
    return {f"{system.name}, {decoding}": (system, decoding) for decoding in decodings for system in systems}


def baselines_of(names: dict[str, tuple[System, str | None]]) -> dict[str, str]:
    """For every system but the warm start: the warm start, under the same decoding."""
    warm = {decoding: name for name, (system, decoding) in names.items() if system.name == WARM_START}
    return {
        name: warm[decoding]
        for name, (system, decoding) in names.items()
        if decoding in warm and system.name != WARM_START
    }


def common_name(baselines: dict[str, str]) -> str | None:
    """What the report calls the baseline."""
    found = set(baselines.values())
    return None if not found else found.pop() if len(found) == 1 else f"the {WARM_START} with the same decoding"
