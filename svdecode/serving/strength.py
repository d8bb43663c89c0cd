"""Each request's own strength, from its arguments to the rows of `compute_logits`.

`RequestStrength` is a logits processor by name only: it changes no logits. It checks what a request asks for, and is told of
every request that enters, leaves or moves in the batch. It serves both model runners of vLLM, whose interfaces differ: V1 moves
requests between rows of the batch, V2 keeps each in a slot and says for every step which slots its rows come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from svdecode.serving.names import KEY, MU

_LARGEST = torch.finfo(torch.float32).max
_PLACE = "svdecode_strengths"


def own_strength(params: SamplingParams | None) -> float | None:
    """A request's own strength, None where it has none.

    Raises:
        ValueError: no finite number, a name that is unknown, or log-probs of the prompt beside it, which vLLM computes without
            saying whose they are.
    """
    extra = (params.extra_args if params is not None else None) or {}
    unknown = [name for name in extra if name.startswith(f"{KEY}_") and name != MU]
    if unknown:
        raise ValueError(f"{unknown[0]} is unknown: the only argument of svdecode is {MU}")
    mu = extra.get(MU)
    if mu is None:
        return None
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not math.isfinite(mu) or abs(mu) > _LARGEST:
        raise ValueError(f"{MU} must be a finite number, got {mu!r}")
    if params is not None and (params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None):
        raise ValueError(f"prompt_logprobs are those of the server's own strength: leave {MU} or prompt_logprobs out")
    return float(mu)


class Strengths:
    """The strengths of the requests in an engine's batch."""

    def __init__(self) -> None:
        self._mu: dict[int, float] = {}
        """Own strengths, by row of the batch (V1) or by slot (V2)."""
        self._places: Sequence[int] | None = None
        """The row of the batch or the slot that each row of the next logits comes from; None once they were computed."""

    @classmethod
    def of(cls, vllm_config: Any) -> Strengths:
        """The one of an engine: the processor and the model are made apart, from one configuration."""
        return vllm_config.__dict__.setdefault(_PLACE, cls())

    def put(self, place: int, mu: float | None) -> None:
        """A request has come into a row or slot."""
        self._mu.pop(place, None)
        if mu is not None:
            self._mu[place] = mu

    def move(self, source: int, target: int, swap: bool) -> None:
        """A request has moved to another row, or two have changed places."""
        here, there = self._mu.pop(source, None), self._mu.pop(target, None)
        self.put(target, here)
        if swap:
            self.put(source, there)

    def expect(self, places: Sequence[int]) -> None:
        """The next logits are those of a step, with rows from these places."""
        self._places = places

    def take(self, rows: int, default: float, device: torch.device) -> tuple[float | Tensor, bool]:
        """(strength of each row, whether one is 0) for the logits that are computed now.

        vLLM computes the logits of a step once, and after it, with the same function, those of prompts for which log-probs were
        asked: they have the server's strength.

        Returns:
            A number where all rows have the same one, else (rows,) float32.

        Raises:
            RuntimeError: there are more or fewer rows than were expected, so that nobody knows whose they are.
        """
        places, self._places = self._places, None
        if places is None or not self._mu:
            return default, default == 0
        if len(places) != rows:
            raise RuntimeError(
                f"{rows} rows of logits where the batch has {len(places)}: whose strength is each one's?"
            )
        found = [self._mu.get(place, default) for place in places]
        if len(set(found)) == 1:
            return found[0], found[0] == 0
        return torch.tensor(found, dtype=torch.float32, device=device), 0 in found


class RequestStrength(ProcessorV1, ProcessorV2):
    """What vLLM's argument `logits_processors` names."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self._strengths = Strengths.of(vllm_config)
        self._count = 0

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called before a request is taken; a ValueError becomes HTTP 400 with its sentence."""
        own_strength(sampling_params)

    def apply(self, logits: Tensor, *_: Any) -> Tensor:
        """Nothing: the logits are steered already."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """V1: it need not run for greedy requests."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1, before each step. vLLM's order: removed, added, moved."""
        if batch_update is not None:
            self._count = batch_update.batch_size
            for row in batch_update.removed:
                self._strengths.put(row, None)
            for row, params, *_ in batch_update.added:
                self._strengths.put(row, own_strength(params))
            for source, target, way in batch_update.moved:
                self._strengths.move(source, target, way == MoveDirectionality.SWAP)
        self._strengths.expect(range(self._count))

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2, as a request comes into a slot; False: its logits are not changed here."""
        self._strengths.put(req_idx, own_strength(sampling_params))
        return False
