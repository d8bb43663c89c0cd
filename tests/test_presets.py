"""The paper's warm starts by name: their numbers, what replaces them, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from peft import IA3Config
from tiny import tiny_model as tiny_architecture

from svdecode.warmstart.presets import PRESETS, preset

METHODS = tuple(PRESETS)


def test_the_presets_are_the_papers():
    for chosen in PRESETS.values():
        assert (chosen.learning_rate, chosen.epochs, chosen.batch_size, chosen.max_length) == (5e-5, 1.0, 1, 512)
    base = tiny_architecture("llama")
    lora, ia3, prompt, prefix = (PRESETS[name].peft_config(base) for name in METHODS)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.1)
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert isinstance(ia3, IA3Config)
    assert prompt.num_virtual_tokens == prefix.num_virtual_tokens == 20
    assert (prefix.prefix_projection, prefix.encoder_hidden_size) == (True, 128)
    assert PRESETS["lora"].peft_config(tiny_architecture("gpt2")).target_modules == "all-linear"


def test_overrides_reach_peft_and_trainer(tmp_path):
    chosen = preset(
        "lora", rank=3, lora_alpha=5, dropout=0.0, target_modules=["q_proj"], learning_rate=1e-3, epochs=2, seed=7
    )
    config = chosen.peft_config(tiny_architecture("llama"))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 5, 0.0, {"q_proj"})
    chosen = dataclasses.replace(chosen, batch_size=2, gradient_accumulation=3, warmup=0.1, weight_decay=0.01)
    arguments = chosen.training_arguments(tmp_path, 5)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 3)
    assert (arguments.num_train_epochs, arguments.learning_rate, arguments.seed, arguments.save_steps) == (
        2,
        1e-3,
        7,
        5,
    )
    assert (arguments.warmup_steps, arguments.weight_decay) == (0.1, 0.01)
    ia3 = preset("ia3", target_modules=["v_proj", "down_proj"]).peft_config(tiny_architecture("llama"))
    assert (ia3.target_modules, ia3.feedforward_modules) == ({"v_proj", "down_proj"}, {"down_proj"})
    prefix = preset("p-tuning-v2", virtual_tokens=4, encoder_hidden_size=6).peft_config(tiny_architecture("llama"))
    assert (prefix.num_virtual_tokens, prefix.encoder_hidden_size) == (4, 6)


@pytest.mark.parametrize(
    ("method", "overrides", "words"),
    [
        ("adapters", {}, "method must be one of lora, ia3, prompt-tuning, p-tuning-v2, got 'adapters'"),
        ("ia3", {"rank": 4}, "rank is a setting of lora, not of ia3"),
        ("lora", {"virtual_tokens": 4}, "virtual_tokens is a setting of prompt-tuning and p-tuning-v2, not of lora"),
        ("lora", {"lr": 1.0}, "lr is not a setting of a warm start"),
        ("lora", {"learning_rate": 0.0}, "learning_rate must be a number above 0, got 0.0"),
        ("lora", {"learning_rate": float("nan")}, "learning_rate must be a number above 0, got nan"),
        ("lora", {"batch_size": 1.5}, "batch_size must be an integer of at least 1, got 1.5"),
        ("lora", {"dropout": 1.0}, "dropout must be a number of at least 0 and below 1, got 1.0"),
        ("lora", {"target_modules": []}, "target_modules is empty"),
        ("prompt-tuning", {"prompt_init": "text"}, "prompt_init must be one of random, vocabulary, got 'text'"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(method, overrides, words):
    with pytest.raises(ValueError, match=words):
        preset(method, **overrides)
