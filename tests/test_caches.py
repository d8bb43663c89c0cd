"""Caches, padding and positions of unusual models: windows, states, quantised keys, frequencies that depend on the length."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import tiny_causal
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import (
    left_padded,
    randomise,
    stateless,
    steered_logprobs,
    tiny_llama,
    tiny_lora,
    tiny_prompt,
    two_model_forwards,
)
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, StaticCache, cache_utils

import svdecode
from svdecode.decoding import state as decoding_state
from svdecode.models.forward_inputs import CACHE, takes

MODES = ["paired", "lazy", "two_pass"]
MU, ALPHA = 1.7, 0.02
STATES = ["lfm2", "bamba", "qwen3_5_text", "falcon_h1", "granitemoehybrid", "qwen3_next", "jamba"]
WINDOWS = ["gpt_neo", "llama4_text", "gemma2"]


def choose(pre, ft):
    return steered_logprobs(pre, ft, MU, alpha=ALPHA).argmax(-1)


def lora_on(base, targets):
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", *STATES, "gpt_neo"])
def test_the_thin_loop_where_a_static_cache_is_preferred(name, monkeypatch):
    """As on a GPU: a state has no use for the mask of a static cache, and GPT-Neo counts keys."""
    model = lora_on(tiny_causal(name), ["q_proj", "v_proj"])
    ids, mask = left_padded()
    expected = stateless(model, ids, mask, 8, choose).tolist()
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA)
    monkeypatch.setattr(decoding_state, "_prefers_static", lambda steered: True)
    caches = []
    made = decoding_state._empty_cache
    monkeypatch.setattr(decoding_state, "_empty_cache", lambda *a: caches.append(made(*a)) or caches[-1])
    assert svdecode.generate(steered, ids, mask, max_new_tokens=8).tolist() == expected
    assert isinstance(caches[0], StaticCache) == (name == "llama")


@pytest.mark.parametrize("mode", MODES)
def test_a_static_cache_where_a_layer_counts_keys(mode):
    model = lora_on(tiny_causal("gpt_neo"), ["q_proj", "v_proj"])
    steered = svdecode.steer(model, mu=MU, mode=mode)
    with pytest.raises(ValueError, match="static cache"):
        steered.generate(left_padded()[0], max_new_tokens=4, cache_implementation="static")


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("name", ["minicpm3", "youtu"])
def test_latent_attention(name, rows):
    """Its heads stand where rows times heads do elsewhere; with as many rows as heads nothing would be said."""
    model = lora_on(tiny_causal(name), ["q_b_proj", "kv_b_proj", "o_proj"])
    ids = torch.randint(3, 97, (rows, 6))
    steered = svdecode.steer(model, mu=MU)
    assert steered.mode == "paired"
    with torch.no_grad():
        got = steered.pair_logits(input_ids=ids)[:2]
    for ours, own in zip(got, two_model_forwards(model, input_ids=ids), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["paired", "two_pass"])
def test_virtual_tokens_behind_padding_on_a_static_cache(mode, monkeypatch):
    model = tiny_prompt("prompt tuning", "gemma2")
    ids, mask = left_padded((7, 4))
    monkeypatch.setattr(decoding_state, "_prefers_static", lambda steered: True)
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
    expected = stateless(model, ids, mask, 6, choose).tolist()
    assert svdecode.generate(steered, ids, mask, max_new_tokens=6, eos_token_id=1).tolist() == expected


@pytest.mark.parametrize("name", [*STATES, *WINDOWS])
def test_virtual_tokens_behind_padding(name):
    model = get_peft_model(tiny_causal(name), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    randomise(model, scale=1.0)
    ids, mask = left_padded()
    steered = svdecode.steer(model.eval(), mu=MU, alpha=ALPHA)
    expected = stateless(model, ids, mask, 6, choose).tolist()
    got = steered.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=0)
    assert got.tolist() == expected
    assert svdecode.generate(steered, ids, mask, max_new_tokens=6, eos_token_id=1).tolist() == expected


@pytest.mark.parametrize("lengths", [(7, 4), (7, 7)])
def test_virtual_tokens_in_a_sliding_window(lengths):
    ids, mask = left_padded(lengths)
    model = tiny_prompt("prompt tuning", "gemma2")
    steered = svdecode.steer(model, mu=MU)
    expected = stateless(model, ids, mask, 6, lambda pre, ft: steered_logprobs(pre, ft, MU).argmax(-1)).tolist()
    options = dict(max_new_tokens=6, do_sample=False)
    assert steered.generate(ids, attention_mask=mask, **options).tolist() == expected
    if lengths[0] != lengths[1]:
        with pytest.raises(ValueError, match="a whole prompt at once"):
            steered.generate(ids, attention_mask=mask, prefill_chunk_size=2, **options)
        prefix = svdecode.steer(tiny_prompt("prefix tuning", "gemma2"), mu=MU)
        with pytest.raises(ValueError, match="more than the model's window of 8"):
            prefix.generate(ids, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("saved", ["layers.1", "self_attn"])
def test_a_saved_module_that_uses_the_cache(saved):
    config = LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=[saved], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    randomise(model)
    with pytest.raises(ValueError, match="saves no module with a cache"):
        svdecode.steer(model.eval(), mu=MU, mode="paired")
    ids, mask = left_padded()
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA)
    assert steered.mode == "lazy"
    got = steered.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert got.tolist() == stateless(model, ids, mask, 6, choose).tolist()


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache")
@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_cache_under_beams(mode, monkeypatch):
    """Its layers hold no keys to count rows by. With a type of 32 bits it forgets nothing."""
    monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "fp8_dtype", torch.float32)
    steered = svdecode.steer(tiny_lora(), mu=MU, alpha=ALPHA, mode=mode)
    ids, mask = left_padded()
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=3, eos_token_id=None)
    got = steered.generate(ids, **options, cache_implementation="quantized", cache_config={"backend": "fp8"})
    assert got.tolist() == steered.generate(ids, **options, use_cache=False).tolist()


def changing(kind):
    """Other rotary frequencies from 16 tokens on."""
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        base = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, rope_parameters=rope))
    else:
        rope = {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 16, "factor": 4.0,
        }  # fmt: skip
        sizes |= {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
        base = Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=rope))
    return base.eval()


@torch.no_grad()
def own_cached(model, ids, steps):
    """Logits of a model's own cached decoding of given tokens."""
    output = model(input_ids=ids[:, :-steps], use_cache=True)
    found = [output.logits[:, -1]]
    for at in range(ids.shape[1] - steps, ids.shape[1]):
        output = model(input_ids=ids[:, at : at + 1], use_cache=True, **{CACHE: output[CACHE]})
        found.append(output.logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("mode", ["paired", "two_pass"])
def test_frequencies_that_every_length_changes(mode):
    """Keys keep the frequencies of their own step, as in each model's cached decoding; tokens that wait would not."""
    model = lora_on(changing("dynamic"), ["q_proj", "v_proj"])
    ids = torch.randint(3, 97, (1, 10))
    steered = svdecode.steer(model, mu=MU, alpha=0.0, mode=mode)
    options = dict(
        max_new_tokens=16, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    out = steered.generate(ids, **options)
    assert svdecode.generate(steered, ids, max_new_tokens=16, eos_token_id=[]).tolist() == out.sequences.tolist()
    adapted = copy.deepcopy(model)
    with model.disable_adapter():
        pre = own_cached(copy.deepcopy(model), out.sequences[:, :-1], 15)
    expected = steered_logprobs(pre, own_cached(adapted, out.sequences[:, :-1], 15), MU, alpha=0.0)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="frequencies that do not depend on the length"):
        svdecode.steer(model, mu=MU, mode="lazy")


@pytest.mark.parametrize("mode", ["paired", "two_pass"])
def test_frequencies_that_change_once(mode):
    model = lora_on(changing("longrope"), ["qkv_proj"])
    ids = torch.randint(3, 97, (2, 10))
    mask = torch.ones_like(ids)
    expected = stateless(model, ids, mask, 14, choose).tolist()
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
    assert svdecode.generate(steered, ids, max_new_tokens=14, eos_token_id=1).tolist() == expected
    got = steered.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=1, pad_token_id=0)
    assert got.tolist() == expected
    beams = [svdecode.generate(steered, row[None], max_new_tokens=14, num_beams=3, eos_token_id=[]) for row in ids]
    alone = [
        steered.generate(row[None], max_new_tokens=14, num_beams=3, do_sample=False, eos_token_id=None, use_cache=False)
        for row in ids
    ]
    assert [b.tolist() for b in beams] == [a.tolist() for a in alone]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_virtual_tokens_do_not_lengthen_the_other_model(kind):
    model = get_peft_model(changing(kind), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    randomise(model, scale=1.0)
    with pytest.raises(ValueError, match="virtual tokens add to"):
        svdecode.steer(model.eval(), mu=MU, mode="paired")
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA)
    assert steered.mode == "two_pass"
    ids = torch.randint(3, 97, (2, 14))  # 19 with the virtual tokens
    mask = torch.ones_like(ids)
    got = steered.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert got.tolist() == stateless(model, ids, mask, 1, choose).tolist()


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba"])
def test_models_that_keep_nothing_but_a_state(name):
    base = tiny_causal(name)
    if not takes(base, CACHE):
        with pytest.raises(ValueError, match="need transformers 5"):
            svdecode.steer(base, pretrained=base, mu=MU)
        return
    model = lora_on(base, ["in_proj"])
    ids, mask = left_padded()
    expected = stateless(model, ids, mask, 8, choose).tolist()
    for mode in ("paired", "two_pass"):
        steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
        options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=1)
        assert steered.generate(ids, **options).tolist() == expected
        assert svdecode.generate(steered, ids, mask, max_new_tokens=8, eos_token_id=1).tolist() == expected
        beams = [steered.generate(ids, **options, num_beams=3, use_cache=cached).tolist() for cached in (True, False)]
        assert beams[0] == beams[1]
        assert svdecode.generate(steered, ids, mask, max_new_tokens=8, num_beams=3, eos_token_id=1).tolist() == beams[1]
    with pytest.raises(ValueError, match="layers all keep keys and values"):
        svdecode.steer(model, mu=MU, mode="lazy")
    with pytest.raises(ValueError, match="a state does not tell how long"):
        svdecode.steer(model, pretrained=model, mu=MU)(input_ids=ids, pretrained_input_ids=ids)
    config = PromptTuningConfig(num_virtual_tokens=3, num_attention_heads=1, task_type="CAUSAL_LM")
    prompted = get_peft_model(tiny_causal(name), config)
    with pytest.raises(ValueError, match="train a LoRA instead"):
        svdecode.steer(prompted, mu=MU)


def test_a_state_outside_the_cache_is_refused():
    model = lora_on(tiny_causal("recurrent_gemma"), ["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="keeps a state outside its cache"):
        svdecode.steer(model, mu=MU)
