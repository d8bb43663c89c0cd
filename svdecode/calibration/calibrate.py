"""`calibrate`: one constant strength for decoding, from gold tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdecode.calibration.collect import collect
from svdecode.calibration.selection import select_settings
from svdecode.constants import ALPHA, KL, Direction
from svdecode.data.splits import prompt_key
from svdecode.models.adapters import adapter_fingerprint
from svdecode.ops import validation
from svdecode.strength.calibration import Calibration
from svdecode.strength.estimators import ESTIMATORS


def calibrate(
    model: PeftModel | PreTrainedModel,
    data: object,
    *,
    pretrained: PreTrainedModel | tuple[PreTrainedModel, PreTrainedModel] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    estimator: str = "exact",
    alpha: float = ALPHA,
    direction: Direction = KL,
    batch_size: int = 8,
    progress: bool = True,
    held_out: object | None = None,
    select: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Estimate the steering strength from gold tokens, with one forward of both models over the data.

    Processes started by accelerate or torchrun share the batches, and each gets the same result as one process alone would.

    Args:
        model: a PeftModel, or any causal LM together with `pretrained`; left as it was.
        data: examples as {"prompt", "completion"}: a list, a Dataset or any iterable of them, however long; or an iterable of
            batches with input_ids, attention_mask and labels (-100 ignored), each row of which is a sequence.
        pretrained: the pre-trained model, where it is not the one under the adapter.
        tokenizer: for texts; an end-of-sequence token is appended to each completion.
        estimator: which of `svdecode.strength.estimators.ESTIMATORS` becomes `mu`; all are reported.
        alpha: confidence threshold in [0, 1]. Memory grows with the kept tokens, 8 bytes each, and 44 bytes per gold token.
        direction: "kl" or "log_ratio".
        batch_size: of texts.
        progress: show a bar on stderr.
        held_out: data of the same kinds that shows whether the strength helps; None judges each half of `data` by the other's.
        select: a metric of `svdecode.calibration.selection.METRICS` that chooses mu, alpha, penalty and direction, in place of
            `estimator`, `alpha` and `direction`; `data` must then be a list or a Dataset.
        max_length: longer texts are cut after so many tokens.
        seed: of the bootstrap and of the halves.

    Raises:
        ValueError: no data, no labelled token, no gold token inside the kept set, or what `steer` raises.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    validation.check_settings(alpha, direction)
    models: dict[str, Any] = dict(
        pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
    )
    chosen: dict[str, Any] = {}
    if select is not None:
        found = select_settings(model, data, select, seed=seed, progress=progress, **models)
        best = found["best"]
        alpha, direction = best["alpha"], best["direction"]
        chosen = {"selected": best["mu"], "penalty": best["penalty"], "selection": found}
    settings: dict[str, Any] = dict(alpha=alpha, direction=direction, **models)
    seen = collect(model, data, progress="calibrate" if progress else None, **settings)
    other = None
    if held_out is not None:
        other = collect(model, held_out, progress="held out" if progress else None, name="held_out", **settings)
        again = len(set(other.sequences) & set(seen.sequences))
        chosen |= {"held_out": other.tokens, "held_out_data": other.sha256, "seen_again": again}
    return Calibration.from_tokens(
        seen.tokens,
        estimator=estimator,
        alpha=alpha,
        direction=direction,
        adapter=adapter_fingerprint(model),
        data=seen.sha256,
        prompts=_prompt_keys(data),
        seed=seed,
        **chosen,
    )


def _prompt_keys(data: object) -> list[str]:
    """Names of the prompts of texts that can be read again; none of batches and of streams."""
    if not isinstance(data, Sequence) and not hasattr(data, "column_names"):
        return []
    rows = [row for row in data if isinstance(row, Mapping) and isinstance(row.get("prompt"), str)]
    return sorted({prompt_key(row) for row in rows})
