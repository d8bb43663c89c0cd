"""Model runner V2: the class that vLLM asks a model for, which sees the batch before each forward.

V2 needs Triton, which has no backend for CPUs, so that this runs on GPUs alone.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from svdecode.serving.names import PREFIX
from svdecode.serving.strength import Strengths


def places_of(input_batch: Any) -> list[int]:
    """The slot that each row of a step's logits comes from: a request has one row, and one more for each drafted token."""
    rows = np.diff(input_batch.cu_num_logits_np)
    return np.repeat(input_batch.idx_mapping_np, rows).tolist()


@functools.cache
def steered_state(cls: type = DefaultModelState) -> type:
    """A model state that also tells `Strengths` whose rows are coming.

    Args:
        cls: the one that the model would have otherwise.
    """

    class State(cls):
        def __init__(self, vllm_config: Any, *rest: Any) -> None:
            super().__init__(vllm_config, *rest)
            self._strengths = Strengths.of(vllm_config)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            self._strengths.expect(places_of(input_batch))
            return super().prepare_inputs(input_batch, req_states)

    State.__name__ = State.__qualname__ = PREFIX + cls.__name__
    return State
