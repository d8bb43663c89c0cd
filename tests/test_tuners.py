"""Every tuner that peft registers: both halves of a steered forward equal forwards of untouched models, or it is refused."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tiny import left_padded, randomise, tiny_llama, two_model_logits
from transformers import MixtralConfig, MixtralForCausalLM

import svdecode

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
# What a config needs beside LINEAR.
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 16},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "OFT": {"r": 0, "oft_block_size": 8},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 32},
    "FOURIERFT": {"n_frequency": 32},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4, 5, 6]},
}
REFUSED = {
    "ADAPTION_PROMPT": "no adapter layers",
    "LILY": "LILY adapters are not supported: its router averages",
    "POLY": "POLY adapters are not supported",
    "SHADOW": "SHADOW adapters are not supported",
    "XLORA": "XLORA adapters are not supported",
    "MULTITASK_PROMPT_TUNING": "MULTITASK_PROMPT_TUNING adapters are not supported: it needs task ids",
}
MODES = ["paired", "lazy", "two_pass"]
PROMPT_LEARNING = {
    "CARTRIDGE": {"num_virtual_tokens": 5},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "PREFIX_TUNING": {"num_virtual_tokens": 5},
    "PROMPT_TUNING": {"num_virtual_tokens": 5},
    "P_TUNING": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
}
TUNERS = sorted(kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING)
LORA = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "LoRA bias": {"target_modules": ["v_proj"], "lora_bias": True},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [3, 4, 5, 6]}},
}


def adapted(config):
    with contextlib.redirect_stderr(io.StringIO()):  # some draw progress bars
        model = get_peft_model(tiny_llama(), config)
    torch.manual_seed(3)
    randomise(model)
    return model.eval()


def of_type(name):
    if name == "ADAMSS":
        pytest.importorskip("sklearn")
    options = PROMPT_LEARNING.get(name) or {**LINEAR, **OPTIONS.get(name, {})}
    return adapted(PEFT_TYPE_TO_CONFIG_MAPPING[name](task_type="CAUSAL_LM", **options))


def assert_halves(model, mode):
    """Left-padded prompts, then eight cached steps."""
    ids, mask = left_padded()
    steered = svdecode.steer(model, mu=1.0, mode=mode)
    assert steered.mode == mode
    cache, start = None, 0
    for length in (ids.shape[1], *range(ids.shape[1] + 1, ids.shape[1] + 9)):
        while ids.shape[1] < length:
            ids = torch.cat([ids, torch.randint(3, 60, (len(ids), 1))], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            pre, ft, output = steered.pair_logits(
                input_ids=ids[:, start:], attention_mask=mask, position_ids=positions[:, start:], past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
        cache, start = output.past_key_values, length
        expected_pre, expected_ft = two_model_logits(model, ids, mask)
        # RandLoRA's large random factors leave 2e-4 between a cached step and a whole forward of the same model
        torch.testing.assert_close(pre[:, -1], expected_pre[:, -1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ft[:, -1], expected_ft[:, -1], rtol=1e-3, atol=1e-3)
    assert (expected_pre - expected_ft).abs().mean() > 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in TUNERS if name not in REFUSED])
def test_both_halves_are_exact(name, mode):
    assert_halves(of_type(name), mode)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in TUNERS if name not in REFUSED])
def test_what_lies_under_the_adapter_is_the_pretrained_model(name):
    """Also after the adapted model has run by itself, which steering is not told of."""
    ids, model = left_padded()[0][:1], of_type(name)
    steered = svdecode.steer(model, mu=1.0)
    model(input_ids=ids)
    torch.testing.assert_close(steered.pair_logits(input_ids=ids)[0], tiny_llama()(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", LORA)
def test_both_halves_of_every_kind_of_lora(variant, mode):
    options = {"target_modules": ["q_proj", "down_proj"], **LORA[variant]}
    assert_halves(adapted(LoraConfig(r=4, task_type="CAUSAL_LM", **options)), mode)


def test_several_active_adapters():
    model = adapted(LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    randomise(model)
    assert_halves(model.eval(), "paired")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused(name):
    options = {
        "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
        "LILY": LINEAR,
        "POLY": LINEAR,
        "SHADOW": {},
        "XLORA": None,
        "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 1},
    }[name]
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip("this peft does not have it yet")
    if options is None:
        pytest.skip("takes a folder of LoRA adapters to make one")
    with contextlib.redirect_stderr(io.StringIO()):
        model = get_peft_model(tiny_llama(), PEFT_TYPE_TO_CONFIG_MAPPING[name](task_type="CAUSAL_LM", **options))
    with pytest.raises(ValueError, match=REFUSED[name]):
        svdecode.steer(model, mu=1.0)


def test_a_model_with_experts_runs_in_two_forwards():
    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomise(model)
    assert svdecode.steer(model.eval(), mu=1.0).mode == "lazy"
    assert svdecode.steer(model, mu=1.0, penalty=-1.0).mode == "two_pass"
    for mode in ("lazy", "two_pass"):
        assert_halves(model, mode)
    with pytest.raises(ValueError, match="without experts"):
        svdecode.steer(model, mu=1.0, mode="paired")


def test_rows_that_do_not_come_in_halves_are_an_error():
    """A layer that sees other than 2B rows, as behind a router of tokens, says so and computes nothing."""
    steered = svdecode.steer(of_type("IA3"), mu=1.0, mode="paired")
    steered._paired_layers.set_rows(2, 5)
    with pytest.raises(RuntimeError, match=r"q_proj is given 3 rows and not 4.*two_pass"):
        steered.model.layers[0].self_attn.q_proj(torch.zeros(3, 5, 32))
