"""Which systems a run compares, by which names, and with what each is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peft import PeftModel

from svdecode import validation
from svdecode.calibration import Calibration, saved_calibration
from svdecode.constants import ALPHA, KL
from svdecode.evaluation.systems import WARM_START, System, alone, compared
from svdecode.evaluation.tasks.base import TEXT, Task


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
    """The systems of a run, all checked; arguments as in `svdecode.evaluation.evaluate`."""
    if not isinstance(model, PeftModel) and pretrained is None:
        if mu is not None:
            raise ValueError("mu needs an adapter: the pre-trained model alone has nothing to steer with")
        return alone()
    strength = saved_calibration(model) if mu is None else mu
    direction = KL
    if isinstance(strength, Calibration):
        direction = strength.direction
        if alpha is not None and alpha != strength.alpha:
            raise ValueError(f"alpha={alpha}, but mu was calibrated with alpha={strength.alpha}: pass a number as mu")
        alpha = strength.alpha
        if penalty is None and strength.penalty is not None and (task.how == TEXT or strength.penalty > -math.inf):
            penalty = strength.penalty
        strength.check(model, alpha, direction, strength.penalty)
        strength = _chosen_estimates(strength, estimators)
    elif estimators is not None:
        raise ValueError("estimators need a calibration, not a number as mu")
    alpha = ALPHA if alpha is None else alpha
    scored = task.how != TEXT
    if penalty is None:
        penalty = 0.0 if scored else -math.inf
    validation.check_settings(alpha, direction, penalty)
    if scored and penalty == -math.inf:
        raise ValueError(
            "penalty must be finite where whole answers are scored: every token outside the kept set is -inf"
        )
    if not isinstance(strength, Calibration):
        strength = validation.check_finite("mu", strength)
    return compared(
        strength, alpha=alpha, penalty=penalty, direction=direction, log_ratio_mu=log_ratio_mu, ablations=ablations
    )


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
