"""Less usual models, adapters and calls: exact, or refused in one sentence that says what to do."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from test_tuners import assert_halves
from tiny import PAD, left_padded, randomise, tiny_llama, tiny_lora
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import svdecode
from svdecode.models.few_rows_linear import FewRowsLinear, use_few_rows
from svdecode.models.paired_layers import HalvedLayer, ScaledLayer
from svdecode.models.steered_cache import companion_of
from svdecode.ops import compiled

IDS, MASK = left_padded()
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": PAD,
    "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
}
SHARED_KEYS = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 32,
}  # fmt: skip


def tiny(kind, **options):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SMALL, **options})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def adapted(model, config):
    model = get_peft_model(model, config)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("mode", ["paired", "lazy", "two_pass"])
@pytest.mark.parametrize("kind", ["minicpm3", "youtu"])
def test_latent_attention_whose_projection_sees_more_axes(kind, mode):
    lora = LoraConfig(r=4, target_modules=["kv_b_proj", "q_b_proj"], task_type="CAUSAL_LM")
    assert_halves(adapted(tiny(kind, **LATENT), lora), mode)


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_by_other_names(kind):
    model = adapted(tiny(kind, **EXPERTS[kind]), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="without experts"):
        svdecode.steer(model, mu=1.0, mode="paired")
    assert svdecode.steer(model, mu=1.0).mode == "lazy"
    assert_halves(model, "two_pass")


@pytest.mark.parametrize("mode", ["paired", "two_pass"])
def test_a_prefix_where_layers_share_their_keys(mode):
    prefix = PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    assert_halves(adapted(tiny("gemma3n_text", **SHARED_KEYS), prefix), mode)


def mixed():
    """LoHa around LoRA in one layer, each alone in others."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), lora, mixed=True)
    model.add_adapter("second", LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    model.set_adapter(["default", "second"])
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("mode", ["paired", "lazy", "two_pass"])
def test_mixed_adapters(mode):
    assert_halves(mixed(), mode)


def test_lora_around_another_adapter_has_no_scale_of_zero():
    """The adapter inside would work on the base rows too."""
    model = get_peft_model(tiny_llama(), LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), mixed=True)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter(["default", "second"])
    randomise(model)
    attention = svdecode.steer(model.eval(), mu=1.0).model.layers[0].self_attn
    assert isinstance(attention.q_proj, HalvedLayer)
    assert isinstance(attention.v_proj, ScaledLayer)
    assert_halves(model, "paired")


def test_rows_that_lora_does_not_know_are_an_error():
    steered = svdecode.steer(tiny_lora(), mu=1.0)
    layer = steered.model.layers[0].self_attn.q_proj
    steered._paired_layers.set_rows(2, 5)
    with pytest.raises(RuntimeError, match=r"is given 3 rows and not 4.*two_pass"):
        layer(torch.zeros(3, 5, 32))
    assert layer(torch.zeros(4, 2, 5, 32)).shape == (4, 2, 5, 32)


@torch.no_grad()
def test_the_model_inside_a_peft_model_has_its_adapter():
    model = tiny_lora()
    expected = svdecode.steer(model, mu=1.0)(input_ids=IDS).logits
    for inner in (model.get_base_model(), model.base_model):
        assert torch.equal(svdecode.steer(inner, mu=1.0)(input_ids=IDS).logits, expected)


def test_steered_and_nested_models_are_refused():
    lora = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    steered = svdecode.steer(tiny_lora(), mu=1.0)
    with pytest.raises(ValueError, match="give the model that it was made of"):
        svdecode.steer(tiny_llama(), pretrained=steered, mu=1.0)
    with pytest.raises(ValueError, match="give the model that it was made of"):
        svdecode.steer(tiny_llama(), pretrained=(tiny_llama(), steered), mu=1.0)
    with pytest.raises(ValueError, match=r"model is a PeftModel inside a PeftModel: .* load_adapter\(\)"):
        svdecode.steer(get_peft_model(tiny_lora(), lora), mu=1.0)
    for call in (
        lambda: steered.generate_batch(inputs=[[5, 6]]),
        lambda: steered.init_continuous_batching(),
    ):
        with pytest.raises(ValueError, match=r"one model: use generate\(\) with left-padded prompts"):
            call()


def test_a_companion_of_an_offloaded_cache():
    model = tiny_llama()
    cache = DynamicCache(config=model.config)
    cache.prefetch_stream = torch.Stream("cpu")  # as offloading=True makes on a GPU
    companion = companion_of(cache, model, same_layers=True)
    assert companion.prefetch_stream is cache.prefetch_stream
    assert companion.layers[0] is not cache.layers[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (torch.zeros(0, 8), torch.float32), (torch.zeros(2, 0, 8), torch.float32), (torch.zeros(8), torch.float32),
        (torch.zeros(2, 4), torch.float32), (torch.tensor(1.0), torch.float32),
        (torch.zeros(2, 8, dtype=torch.bfloat16), torch.float32), (torch.zeros(2, 8), torch.bfloat16),
    ],
)  # fmt: skip
def test_the_product_for_few_rows_says_what_torch_says(x, dtype):
    """Empty inputs, other widths and other dtypes: `dtype` is the bias's."""
    ours, theirs = nn.Sequential(nn.Linear(8, 5)), nn.Linear(8, 5)
    ours[0].load_state_dict(theirs.state_dict())
    use_few_rows(ours)
    for layer in (ours[0], theirs):
        layer.bias.data = layer.bias.data.to(dtype)
    assert isinstance(ours[0], FewRowsLinear) or compiled.WHY_MISSING is not None
    try:
        expected = theirs(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            ours[0](x)
    else:
        assert torch.equal(ours[0](x), expected)


A, B = torch.randn(2, 4, 10), torch.randn(2, 4, 10)
TRANSFORMS = {
    "vmap": (lambda f: torch.func.vmap(f)(A, B), r"torch\.func\.vmap: call it on the whole batch"),
    "functionalize": (lambda f: torch.func.functionalize(f)(A, B), r"torch\.func\.functionalize: use torch\.compile"),
    "trace": (lambda f: torch.jit.trace(f, (A, B)), r"torch\.jit\.trace: use torch\.compile or torch\.export"),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.skipif(compiled.WHY_MISSING is not None, reason=str(compiled.WHY_MISSING))
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_transforms_of_torch_that_cannot_see_into_an_operator(transform):
    run, message = TRANSFORMS[transform]
    with svdecode.use_backend("cpu"), pytest.raises(RuntimeError, match=rf"^fused_steer .*{message}[^\n]*$"):
        run(lambda pre, ft: svdecode.fused_steer(pre, ft, 1.0).logprobs)
