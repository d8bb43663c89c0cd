"""Plausible use at the edges of a steered model: what must be right, and what must be refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from tiny import (
    left_padded,
    randomise,
    steered_logprobs,
    tiny_llama,
    tiny_lora,
    tiny_model,
    tiny_prompt,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import svdecode
from svdecode.decoding import state as decoding_state
from svdecode.models.forward_inputs import CACHE, CACHE_NAMES
from svdecode.ops import backends

MU = 1.7
IDS = torch.tensor([[5, 6, 7, 8]])


def test_the_model_under_the_adapter_is_no_second_model():
    model = tiny_lora()
    for same in (model.get_base_model(), copy.copy(model)):
        with pytest.raises(ValueError, match="leave pretrained out"):
            svdecode.steer(model, pretrained=same, mu=MU)


def test_adapters_that_peft_steers_from_outside_are_refused():
    with pytest.raises(ValueError, match="activated LoRA"):
        svdecode.steer(tiny_lora(alora_invocation_tokens=[5, 6]), mu=MU)


def test_trained_biases_of_any_active_adapter_are_refused():
    model = tiny_lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="bias='lora_only'"):
        svdecode.steer(model, mu=MU)


def test_trained_biases_of_an_adapter_that_transformers_added_are_refused():
    by_transformers = tiny_llama()
    try:
        by_transformers.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"))
    except ValueError as error:  # transformers 5.24 asks for a peft that is not out yet
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="bias='all'"):
        svdecode.steer(by_transformers, mu=MU)


def test_the_cache_may_have_the_name_of_any_version():
    steered = svdecode.steer(tiny_lora(), mu=MU)
    whole = steered(input_ids=IDS).logits[:, -1]
    for name in CACHE_NAMES:
        cache = DynamicCache(config=steered.config)
        steered(input_ids=IDS[:, :-1], use_cache=True, **{name: cache})
        torch.testing.assert_close(steered(input_ids=IDS[:, -1:], **{name: cache}).logits[:, -1], whole)
        first = steered.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, do_sample=False)
        again = steered.generate(first.sequences, max_new_tokens=2, do_sample=False, **{name: first[CACHE]})
        assert torch.equal(again, steered.generate(IDS, max_new_tokens=4, do_sample=False))


def test_encoder_decoder_models_are_refused():
    config = T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(TypeError, match="causal language model"):
        svdecode.steer(T5ForConditionalGeneration(config), pretrained=tiny_llama(), mu=MU)


def test_the_loss_is_in_front_and_scaled_as_trainer_wants():
    steered = svdecode.steer(tiny_lora(), mu=MU, penalty=-1.0)
    labels = IDS.clone()
    whole = steered(input_ids=IDS, labels=labels)
    assert next(iter(whole)) == "loss"
    assert torch.equal(steered(input_ids=IDS, labels=labels, return_dict=False)[0], whole.loss)
    scaled = steered(input_ids=IDS, labels=labels, num_items_in_batch=30).loss
    torch.testing.assert_close(scaled * 30, whole.loss * 3)


def test_arguments_that_cannot_be_right_are_refused():
    two = svdecode.steer(tiny_llama(seed=1), pretrained=tiny_llama(seed=2), mu=MU, mode="two_pass")
    embeds = two.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="two models need input_ids"):
        two(inputs_embeds=embeds)
    steered = svdecode.steer(tiny_lora(), mu=MU)
    with pytest.raises(ValueError, match="logits_to_keep must be a number"):
        steered(input_ids=IDS, logits_to_keep=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="pretrained_input_ids need input_ids"):
        steered(inputs_embeds=embeds, pretrained_input_ids=IDS)
    with pytest.raises(ValueError, match="pretrained_attention_mask must have the shape"):
        steered(input_ids=IDS, pretrained_input_ids=IDS, pretrained_attention_mask=torch.ones(1, 3))


def test_weights_are_moved_and_saved_by_their_owner(tmp_path):
    steered = svdecode.steer(tiny_lora(), mu=MU)
    assert steered.to("cpu").float() is steered
    with pytest.raises(RuntimeError, match="steer it again"):
        steered.to(torch.bfloat16)
    with pytest.raises(ValueError, match="shares its weights"):
        steered.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["lazy", "two_pass"])
def test_models_that_count_positions_differently(mode):
    """An expert with ALiBi and an amateur with learned positions: padded rows as alone."""
    torch.manual_seed(0)
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, pad_token_id=0, eos_token_id=1)
    ).eval()  # fmt: skip
    ids, mask = left_padded((7, 4))
    for expert, amateur in ((bloom, tiny_model("gpt2")), (tiny_model("gpt2"), bloom)):
        steered = svdecode.steer(expert, pretrained=amateur, mu=MU, alpha=0.02, mode=mode)
        options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        together = steered.generate(ids, attention_mask=mask, **options)
        alone = steered.generate(ids[1:, 3:], **options)
        assert together[1, 7:].tolist() == alone[0, 4:].tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_own_prompts_in_a_forward_without_positions(architecture):
    model = tiny_model(architecture)
    own, own_mask = torch.tensor([[0, 0, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    found = []
    for mode in ("paired", "two_pass"):
        steered = svdecode.steer(model, pretrained=model, mu=0.5, alpha=0.0, direction="log_ratio", mode=mode)
        with torch.no_grad():
            found.append(steered(input_ids=IDS, pretrained_input_ids=own, pretrained_attention_mask=own_mask).logits)
            alone = [model(t).logits[:, -1] for t in (own[:, 2:], IDS)]
        expected = steered_logprobs(*alone, 0.5, alpha=0.0, direction="log_ratio")
        torch.testing.assert_close(found[-1][:, -1], expected, rtol=1e-3, atol=1e-3)
        torch.manual_seed(0)
        inferred, given = (
            steered.generate(IDS, pretrained_input_ids=own, max_new_tokens=5, do_sample=False, **extra)
            for extra in ({}, {"pretrained_attention_mask": own_mask})
        )
        assert torch.equal(inferred, given)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_caches_know_whose_they_are():
    model = tiny_llama()
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    one, other = (svdecode.steer(tiny_lora(), mu=MU, mode=mode) for mode in ("paired", "lazy"))
    cache = one.generate(IDS, **options).past_key_values
    with pytest.raises(ValueError, match="of another steered one"):
        other.generate(IDS, past_key_values=cache, **options)
    cache.reset()
    if cache.get_seq_length() == 0:  # transformers 5.17 keeps the length of a dynamic cache
        again = other.generate(IDS, past_key_values=cache, **options).sequences
        assert torch.equal(again, other.generate(IDS, **options).sequences)
    guided = svdecode.steer(model, pretrained=model, mu=0.5, alpha=0.0, direction="log_ratio")
    whole = guided.generate(IDS, pretrained_input_ids=IDS.flip(1), **(options | {"max_new_tokens": 8})).sequences
    first = guided.generate(IDS, pretrained_input_ids=IDS.flip(1), **options)
    with pytest.raises(ValueError, match="pass them again"):
        guided.generate(first.sequences, past_key_values=first.past_key_values, **options)
    rest = guided.generate(
        first.sequences, past_key_values=first.past_key_values, pretrained_input_ids=IDS.flip(1), **options
    )
    assert torch.equal(rest.sequences, whole)
    static = StaticCache(config=model.config, max_cache_len=16)
    for own in ({}, {"pretrained_input_ids": IDS.flip(1)}):  # 4-d masks, then masks of each side's own
        static.reset()
        plain = guided.generate(IDS, **own, **options).sequences
        assert torch.equal(guided.generate(IDS, past_key_values=static, **own, **options).sequences, plain)


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_a_cache_that_is_cropped_to_its_virtual_tokens(kind):
    steered = svdecode.steer(tiny_prompt(kind), mu=MU)
    with torch.no_grad():
        first = steered(input_ids=IDS, use_cache=True)
        first.past_key_values.crop(-IDS.shape[1])
        again = steered(input_ids=IDS, past_key_values=first.past_key_values)
    torch.testing.assert_close(again.logits, first.logits, rtol=1e-4, atol=1e-4)


def test_prompt_encoders_do_not_drop_out():
    config = PromptEncoderConfig(
        num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=16, encoder_num_layers=2,
        encoder_dropout=0.5, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_llama(), config).train()
    randomise(model, scale=0.5)
    steered = svdecode.steer(model, mu=MU)
    assert torch.equal(steered(input_ids=IDS).logits, steered(input_ids=IDS).logits)
    assert model.training


def test_the_thin_loop_leaves_nothing_that_training_cannot_use():
    steered = svdecode.steer(tiny_lora(), mu=MU, penalty=-1.0)
    svdecode.generate(steered, IDS, max_new_tokens=2)
    steered(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("penalty", [-torch.inf, -1.0])
def test_the_thin_loop_makes_nothing_of_the_size_of_the_vocabulary(num_beams, penalty, monkeypatch):
    """Outside the models' forwards no operation has a result with as many entries as one row of logits."""
    vocabulary, made, next_logits = 5003, [], decoding_state.DecodingState.next_logits

    class Watch(TorchDispatchMode):
        inside = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if not self.inside:
                sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor) and not x._is_view()]
                made.append((max(sizes, default=0), str(func)))
            return result

    def forward(state):
        Watch.inside = True
        logits = next_logits(state)
        Watch.inside = False
        return logits

    monkeypatch.setattr(decoding_state.DecodingState, "next_logits", forward)
    steered = svdecode.steer(tiny_lora(vocabulary), mu=MU, alpha=0.02, penalty=penalty)
    monkeypatch.setattr(backends._PREFERRED, "name", "cpu")
    with Watch():
        svdecode.generate(steered, IDS, max_new_tokens=4, num_beams=num_beams, eos_token_id=[])
    operator = "steer_topk" if num_beams > 1 else "steer_sample"
    assert any(operator in name for _, name in made)
    assert max(made)[0] < vocabulary, max(made)


def test_the_thin_loop_on_a_static_cache(monkeypatch):
    """As on a GPU: greedy and beams, whose prompts become rows of their own after the first step."""
    ids, mask = left_padded()
    for model in (tiny_lora(), tiny_prompt("prefix tuning")):
        steered = svdecode.steer(model, mu=MU, alpha=0.02)
        expected = [svdecode.generate(steered, ids, mask, max_new_tokens=8, num_beams=n).tolist() for n in (1, 3)]

        def static(steered, room):
            virtual = 0 if steered._virtual_tokens is None else steered._virtual_tokens.count
            return StaticCache(config=steered.config, max_cache_len=room + virtual)

        with monkeypatch.context() as patched:
            patched.setattr(decoding_state, "_empty_cache", static)
            found = [svdecode.generate(steered, ids, mask, max_new_tokens=8, num_beams=n).tolist() for n in (1, 3)]
        assert found == expected


def test_rows_without_a_distribution_are_an_error():
    model = tiny_lora()
    broken = nn.Parameter(model.get_base_model().lm_head.weight.clone())
    broken.data[3] = torch.nan
    model.get_base_model().lm_head.weight = broken
    for beams in (1, 2):
        with pytest.raises(RuntimeError, match="NaN"):
            svdecode.generate(svdecode.steer(model, mu=MU), IDS, max_new_tokens=2, num_beams=beams)


@torch.no_grad()
def test_the_product_for_few_rows_leaves_what_it_does_not_know():
    model = tiny_lora()
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    expected = svdecode.steer(model, mu=MU)(input_ids=IDS[:, :2]).logits
    layer.weight.data = layer.weight.data.t().contiguous().t()
    steered = svdecode.steer(model, mu=MU)
    torch.testing.assert_close(steered(input_ids=IDS[:, :2]).logits, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert steered.pair_logits(input_ids=IDS[:, :2])[1].dtype == torch.bfloat16
