"""The NLL of held-out data over mu, for both directions over the whole vocabulary: what the demo's first panel draws."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from svdecode.calibration.collect import collect
from svdecode.constants import KL, LOG_RATIO
from svdecode.strength.bootstrap import curve_band
from svdecode.strength.calibration import Calibration
from svdecode.strength.family import MAX_STRENGTH, Family
from svdecode.strength.nll_curve import with_both_zeros

_FRACTIONS = (-0.5, -0.25, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
_SMALLEST_SCALE = 0.25
_POINTS = 71  # the steps of 0.05 meet 0 and the best strength


def direction_curves(
    model: PeftModel,
    data: list[dict[str, str]],
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    progress: bool,
) -> dict[str, dict[str, object]]:
    """One reading of the data: by direction, "mus", "change" of the mean NLL against mu = 0 (nats), "low" and "high" (95%).

    Args:
        model: the warm start.
        data: examples that judge.
        calibration: made with `compare`; its table has the strengths around which the curves are drawn ("mu").
        tokenizer: the model's.
        batch_size: of the examples.
        progress: show a bar on stderr.
    """
    best = {row["direction"]: row["mu"] for row in calibration.table if row["over_temperature"] and row["alpha"] == 0}
    families = {direction: Family(direction, 0.0) for direction in (KL, LOG_RATIO)}
    at = {family: _grid(best[direction]) for direction, family in families.items()}
    bar = "curves" if progress else None
    found = collect(model, data, list(at), at=at, tokenizer=tokenizer, batch_size=batch_size, progress=bar)
    curves = {}
    for direction, family in families.items():
        curve, (low, high) = found.curves[family], (at[family][0].item(), at[family][-1].item())
        mus = [low + (high - low) * i / (_POINTS - 1) for i in range(_POINTS)]
        band = curve_band(curve, mus)
        curves[direction] = {
            "mu": best[direction],
            "mus": mus,
            "change": [curve.mean(mu) - curve.mean(0.0) for mu in mus],
            "low": band[0].tolist(),
            "high": band[1].tolist(),
        }
    return curves


def _grid(mu: float) -> torch.Tensor:
    """Strengths around 0 and the best one, rising, 0 twice."""
    scale = max(abs(mu), _SMALLEST_SCALE) * (-1 if mu < 0 else 1)
    return with_both_zeros((torch.tensor(_FRACTIONS, dtype=torch.float64) * scale).clamp(-MAX_STRENGTH, MAX_STRENGTH))
