"""`calibrate`: one constant strength for decoding, from gold tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdecode.calibration.collect import Collected, collect
from svdecode.calibration.selection import select_settings
from svdecode.constants import ALPHA, KL, PENALTY, Direction
from svdecode.data.splits import prompt_key
from svdecode.models.adapters import adapter_fingerprint
from svdecode.ops import validation
from svdecode.strength.calibration import Calibration
from svdecode.strength.estimators import ESTIMATORS
from svdecode.strength.fair_table import compared, fair_table, recommended
from svdecode.strength.family import Family
from svdecode.strength.nll_curve import with_both_zeros
from svdecode.strength.refinement import strengths_to_add


def calibrate(
    model: PeftModel | PreTrainedModel,
    data: object,
    *,
    pretrained: PreTrainedModel | tuple[PreTrainedModel, PreTrainedModel] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    estimator: str = "exact",
    alpha: float = ALPHA,
    direction: Direction = KL,
    penalty: float | None = None,
    batch_size: int = 8,
    progress: bool = True,
    held_out: object | None = None,
    select: str | None = None,
    compare: bool = True,
    recommend: bool = False,
    max_length: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Estimate the steering strength from gold tokens, with one or two forwards of both models over the data.

    Processes started by accelerate or torchrun share the batches, and each gets the same result as one process alone would.

    Args:
        model: a PeftModel, or any causal LM together with `pretrained`; left as it was.
        data: examples as {"prompt", "completion"}: a list, a Dataset or any iterable of them, however long; or an iterable of
            batches with input_ids, attention_mask and labels (-100 ignored), each row of which is a sequence.
        pretrained: the pre-trained model, where it is not the one under the adapter.
        tokenizer: for texts; an end-of-sequence token is appended to each completion.
        estimator: which of `svdecode.strength.estimators.ESTIMATORS` becomes `mu`; all are reported.
        alpha: confidence threshold in [0, 1]; 0 keeps the whole vocabulary. Memory does not depend on it.
        direction: "kl" or "log_ratio".
        penalty: lambda <= 0 that the strength is found for, and that `steer` then uses. None is -inf, the paper's: the gold
            tokens of the kept set alone are scored, and the calibration leaves the penalty of `steer` open.
        batch_size: of texts.
        progress: show a bar on stderr.
        held_out: data of the same kinds that shows whether the strength helps; None judges each half of `data` by the other's.
        select: a metric of `svdecode.calibration.metrics.METRICS` that chooses mu, alpha, penalty and direction, in place of
            `estimator`, `alpha` and `direction`; `data` must then be a list or a Dataset.
        compare: fill `table` and `recommendation`: the warm start, its best temperature, and both directions, masked and over
            the whole vocabulary, each at its best strength.
        recommend: let the calibration carry the setting of `recommendation` in place of the named one; a strength of 0 over
            the whole vocabulary, which is the warm start, where no steering is recommended.
        max_length: longer texts are cut after so many tokens.
        seed: of the bootstrap and of the halves.

    Raises:
        ValueError: no data, no labelled token, no gold token inside the kept set, or what `steer` raises.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    validation.check_settings(alpha, direction, PENALTY if penalty is None else penalty)
    if recommend and select is not None:
        raise ValueError("recommend and select both choose the setting: pass one of them")
    models: dict[str, Any] = dict(
        pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
    )
    chosen: dict[str, Any] = {}
    if select is not None:
        found = select_settings(model, data, select, seed=seed, progress=progress, **models)
        best = found["best"]
        alpha, direction, penalty = best["alpha"], best["direction"], best["penalty"]
        chosen = {"selected": best["mu"], "selection": found}
    own = Family(direction, alpha, PENALTY if penalty is None else penalty)
    masked = alpha or ALPHA
    others = compared(masked) if compare or recommend else []
    families = [own, *(family for family in others if family != own)]
    bar = "calibrate" if progress else None
    seen = collect(model, data, families, seed=seed, progress=bar, **models)
    other = None
    if held_out is not None:
        at = {family: _judged_at(family, seen) for family in families}
        bar = "held out" if progress else None
        other = collect(model, held_out, families, at=at, progress=bar, name="held_out", **models)
        again = len(set(other.sequences) & set(seen.sequences))
        chosen |= {"held_out_data": other.sha256, "seen_again": again}
    if compare or recommend:
        curves = None if other is None else other.curves
        chosen["table"], chosen["judged"] = fair_table(seen.curves, seen.gold, masked, curves, seed)
        chosen["recommendation"] = recommended(chosen["table"], held_out is not None)
    if recommend:
        row = chosen["recommendation"]["row"]
        steers = chosen["recommendation"]["use"] == "steering"
        own = Family(row["direction"], row["alpha"]) if steers else Family(KL, 0.0)
        penalty, estimator = None, "exact"
        chosen |= {} if steers else {"selected": 0.0}
    return Calibration.from_tokens(
        seen.tokens(own),
        estimator=estimator,
        alpha=own.alpha,
        direction=own.setting(0.0).direction,
        penalty=penalty,
        held_out=None if other is None else other.tokens(own),
        adapter=adapter_fingerprint(model),
        data=seen.sha256,
        prompts=_prompt_keys(data),
        seed=seed,
        **chosen,
    )


def _judged_at(family: Family, seen: Collected) -> Tensor:
    """Where held-out data are looked at: wherever the calibration data were, and at the minimum."""
    curve = seen.curves[family]
    return with_both_zeros(torch.cat([curve.mus, strengths_to_add(curve, seen.gold.get(family))]))


def _prompt_keys(data: Any) -> list[str]:
    """Names of the prompts of texts that can be read again; none of batches and of streams."""
    if not isinstance(data, Sequence) and not hasattr(data, "column_names"):
        return []
    rows = [row for row in data if isinstance(row, Mapping) and isinstance(row.get("prompt"), str)]
    return sorted({prompt_key(row) for row in rows})
