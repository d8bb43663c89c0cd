"""Every family of models: greedy tokens and log-probs equal those of svdecode.steer, in chunks, from the cache and alone."""

from __future__ import annotations

import kit
import pytest

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("kind", kit.FAMILIES)
def test_a_family(kind, models):
    folder = kit.tiny(models, kind)
    steered = kit.in_transformers(folder)
    inputs = kit.prompts()
    wanted = [kit.reference(steered, prompt) for prompt in inputs]
    llm = kit.engine(folder)
    kit.assert_equal(kit.ask(llm, inputs), wanted)
    again = kit.ask(llm, inputs)
    kit.assert_equal(again, wanted)
    assert sum(output.num_cached_tokens for output in again) >= 96
    for prompt, one in list(zip(inputs, wanted, strict=True))[:2]:  # a batch of a single token
        kit.assert_equal(kit.ask(llm, [prompt]), [one])


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2"])
def test_compiled(kind, models):
    folder = kit.tiny(models, kind)
    steered = kit.in_transformers(folder)
    inputs = kit.prompts()
    # First: vLLM's backend changes the classes of transformers.
    wanted = [kit.reference(steered, prompt) for prompt in inputs]
    kit.assert_equal(kit.ask(kit.engine(folder, enforce_eager=False), inputs), wanted)
