"""Kinds of LoRA, and a model that is spread over processes."""

from __future__ import annotations

import kit
import pytest
import torch

from svdecode.serving.names import MU

pytestmark = pytest.mark.engine

STRENGTHS = (0.3, 2.0, -1.0, 0.7, 1.2, 5.0, -0.5)  # of the kit's prompts
ADAPTERS = {
    "rank-stabilised": {"use_rslora": True, "r": 8},
    "ranks and alphas of their own": {
        "rank_pattern": {"q_proj": 8, "down_proj": 2}, "alpha_pattern": {"o_proj": 32, "up_proj": 1},
    },
    "part of a packed layer": {"target_modules": ["v_proj", "up_proj"]},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.fixture
def two_cores(monkeypatch, _seed):
    """One for each process; by itself vLLM wants a NUMA node for each."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    if torch._dynamo.config.disable:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def check(folder, **options):
    """With the server's strength, and with each request's own."""
    inputs = kit.prompts()
    steered, llm = kit.in_transformers(folder), kit.engine(folder, **options)
    wanted = [kit.reference(steered, prompt) for prompt in inputs]
    kit.assert_equal(kit.ask(llm, inputs), wanted)
    own = [kit.greedy(extra_args={MU: mu}) for mu in STRENGTHS]
    for place, mu in enumerate(STRENGTHS):
        steered.mu = mu
        wanted[place] = kit.reference(steered, inputs[place])
    kit.assert_equal(kit.ask(llm, inputs, own), wanted)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_lora(kind, models):
    check(kit.tiny(models, "llama", **ADAPTERS[kind]))


@pytest.mark.parametrize("kind", ["llama", "phi3"])  # packed by vLLM, and packed in the checkpoint
def test_two_tensor_parallel_ranks(kind, models, two_cores):
    check(kit.tiny(models, kind), tensor_parallel_size=2)


@pytest.mark.compiled  # an eager pipeline fails in vLLM 0.32, also unsteered
def test_two_pipeline_stages(models, two_cores):
    check(kit.tiny(models, "llama"), pipeline_parallel_size=2, enforce_eager=False)
