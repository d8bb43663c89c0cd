"""Whose strength is each row's: the bookkeeping of both model runners, without an engine."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
import vllm.triton_utils
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from svdecode.serving.model_state import places_of, steered_state
from svdecode.serving.names import MU
from svdecode.serving.strength import RequestStrength, Strengths

CPU = torch.device("cpu")


def params(mu):
    return SamplingParams(extra_args=None if mu is None else {MU: mu})


@pytest.fixture
def config():
    return types.SimpleNamespace()


def update(size, removed=(), added=(), moved=()):
    return BatchUpdate(size, removed, [(row, params(mu), None, []) for row, mu in added], moved)


def taken(config, rows, default=9.0):
    mu, has_zero = Strengths.of(config).take(rows, default, CPU)
    return (mu.tolist() if isinstance(mu, torch.Tensor) else mu), has_zero


def test_rows_that_are_added_swapped_moved_and_removed(config):
    processor = RequestStrength(config, CPU, False)
    processor.update_state(update(3, added=[(0, 1.0), (1, None), (2, 0.0)]))
    assert taken(config, 3) == ([1.0, 9.0, 0.0], True)
    processor.update_state(update(3, moved=[(0, 2, MoveDirectionality.SWAP)]))
    assert taken(config, 3) == ([0.0, 9.0, 1.0], True)
    processor.update_state(update(2, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert taken(config, 2) == ([1.0, 9.0], False)
    processor.update_state(update(2, added=[(0, None)]))  # another request in the same row
    assert taken(config, 2) == (9.0, False)


def test_logits_of_prompts_have_the_strength_of_the_server(config):
    """They are computed after those of the step, also where there are as many of them."""
    processor = RequestStrength(config, CPU, False)
    processor.update_state(update(2, added=[(0, 1.0), (1, 2.0)]))
    assert taken(config, 2) == ([1.0, 2.0], False)
    assert taken(config, 2) == (9.0, False)
    processor.update_state(None)  # the next step, with the same requests
    assert taken(config, 2) == ([1.0, 2.0], False)


def test_a_number_of_rows_that_nobody_expects_is_an_error(config):
    RequestStrength(config, CPU, False).update_state(update(2, added=[(0, 1.0), (1, 2.0)]))
    with pytest.raises(RuntimeError, match="whose strength"):
        taken(config, 5)


def test_slots_of_model_runner_v2(config):
    """A request has a row for each drafted token too, and slots are used again."""
    processor = RequestStrength(config, object())
    assert processor.add_request(4, params(1.0)) is False
    processor.add_request(7, params(None))
    batch = types.SimpleNamespace(idx_mapping_np=np.array([7, 4]), cu_num_logits_np=np.array([0, 1, 4]))
    assert places_of(batch) == [7, 4, 4, 4]

    class Default:
        def __init__(self, *_):
            pass

        def prepare_inputs(self, input_batch, req_states):
            return {"of": input_batch}

    state = steered_state(Default)(config, None, None, CPU)
    assert state.prepare_inputs(batch, None) == {"of": batch}
    assert taken(config, 4) == ([9.0, 1.0, 1.0, 1.0], False)
    processor.add_request(4, params(None))
    state.prepare_inputs(batch, None)
    assert taken(config, 4) == (9.0, False)


@pytest.mark.skipif(not vllm.triton_utils.HAS_TRITON, reason="vLLM's model runner V2 needs a GPU, or Triton for CPUs")
@pytest.mark.engine
def test_model_runner_v2(models, monkeypatch):
    import kit

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    folder = kit.tiny(models, "llama")
    mus = [0.0, 2.0, kit.MU, -1.0, 0.3, 5.0, 1.2]
    steered, wanted = kit.in_transformers(folder), []
    for prompt, mu in zip(kit.prompts(), mus, strict=True):
        steered.mu = mu
        wanted.append(kit.reference(steered, prompt))
    params = [kit.greedy(extra_args={MU: mu}, logprobs=None if mu == 0 else 5) for mu in mus]
    kit.assert_equal(kit.ask(kit.engine(folder), kit.prompts(), params), wanted)
