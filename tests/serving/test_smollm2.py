"""The bundled model, of real size: tokens and log-probs equal those of svdecode.steer."""

from __future__ import annotations

import conftest
import kit
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from svdecode.serving.bundled import bundled_folder

pytestmark = pytest.mark.engine

TEXTS = (
    "The capital of France is",
    "<|im_start|>user\nWhat is the capital of Kenya?<|im_end|>\n<|im_start|>assistant\n",
    "Once",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    " ".join(["The quick brown fox jumps over the lazy dog."] * 12),
)


def test_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(conftest.CACHE))
    folder = bundled_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kit.adapter(base, tmp_path / "lora", scale=0.02, r=8)
    inputs = [tokenizer(text).input_ids for text in TEXTS]
    steered = kit.in_transformers(folder, lora=tmp_path / "lora")
    wanted = [kit.reference(steered, prompt, 24) for prompt in inputs]
    llm = kit.engine(folder, lora=tmp_path / "lora", block_size=128, max_num_batched_tokens=64)
    for _ in range(2):  # the second time from the cache
        kit.assert_equal(kit.ask(llm, inputs, kit.greedy(24)), wanted)
