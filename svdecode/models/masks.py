"""Whether the logits processors of a `generate()` may forbid every kept token, and so need scores for the others."""

from __future__ import annotations

import math
from collections.abc import Iterable

from transformers.generation import logits_process
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from svdecode.ops.floor import FLOOR_GAP

# What leaves at least one kept token to choose, whatever its settings are. Anything else, also a user's own, may mask.
_LEAVE_A_CHOICE = frozenset(
    getattr(logits_process, name)
    for name in (
        "EncoderRepetitionPenaltyLogitsProcessor", "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor",
        "LogitNormalization", "MinPLogitsWarper", "RepetitionPenaltyLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor",
        "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper",
        "WatermarkLogitsProcessor",
    )
)  # fmt: skip


def floor_gap(processors: Iterable[object]) -> float | None:
    """The gap in nats that `with_floor` needs under these processors, or None where none of them can forbid all of K.

    A temperature above 1 divides the gap, so the gap is that many times larger: no draw sees it at any temperature.

    ValueError for `guidance_scale`, which subtracts log-probabilities, of which -inf - -inf is none.
    """
    processors = list(processors)
    if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors):
        raise ValueError(
            "guidance_scale subtracts log-probabilities, which are -inf outside the kept set: steer with a finite penalty"
        )
    if all(type(processor) in _LEAVE_A_CHOICE for processor in processors):
        return None
    temperatures = (p.temperature for p in processors if isinstance(p, TemperatureLogitsWarper))
    return FLOOR_GAP * math.prod(max(temperature, 1.0) for temperature in temperatures)
