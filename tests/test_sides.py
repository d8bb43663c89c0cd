"""Several models out of one tree of modules: an adapter against its own base, two adapters of one model, as pairs and alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import batches, left_padded, randomise, tiny_llama, tiny_lora, tiny_prompt

import svdecode

MODES = ["lazy", "two_pass"]
IDS, MASK = left_padded()
LARGE = 9


def two_adapters():
    """One model with the adapters "default" and "second", the first one active."""
    model = tiny_lora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def alone(model, adapter):
    """A model that shares nothing, with one adapter; None: without."""
    if adapter is None:
        return tiny_llama()
    model = copy.deepcopy(model)
    model.set_adapter(adapter)
    return model


def check(together, separate, mode, direction="log_ratio"):
    """Steered models of (model, pretrained) are one, by logits and by tokens."""
    options = dict(mu=0.8, alpha=0.05, direction=direction, mode=mode)
    found = [svdecode.steer(model, pretrained=pretrained, **options) for model, pretrained in (together, separate)]
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    logits = []
    for steered in found:
        with torch.no_grad():
            pre, ft, _ = steered.pair_logits(input_ids=IDS, attention_mask=MASK, position_ids=positions)
        logits.append((pre[:, -1].float(), ft[:, -1].float()))
    for ours, theirs in zip(*logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (logits[0][0] - logits[0][1]).abs().mean() > 0.1
    for options in ({}, {"num_beams": 3}):
        tokens = [s.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, **options) for s in found]
        assert tokens[0].tolist() == tokens[1].tolist()
    thin = [svdecode.generate(s, IDS, MASK, max_new_tokens=6).tolist() for s in found]
    assert thin[0] == thin[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", ["log_ratio", "kl"])
def test_an_adapter_against_its_own_base(mode, direction):
    large, small = tiny_llama(seed=LARGE), tiny_llama()
    tuned = get_peft_model(small, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(tuned)
    separate = (copy.deepcopy(tuned), tiny_llama())
    check((large, (tuned, small)), (large, separate), mode, direction)
    check((large, (small, tuned)), (large, separate[::-1]), mode, direction)
    check((large, (tuned, tuned.get_base_model())), (large, separate), mode, direction)


@pytest.mark.parametrize("mode", MODES)
def test_two_adapters_of_one_model(mode):
    large, model = tiny_llama(seed=LARGE), two_adapters()
    separate = (alone(model, "default"), alone(model, "second"))
    check((large, ((model, "default"), (model, "second"))), (large, separate), mode)
    check((large, (model, (model, "second"))), (large, separate), mode)
    check((large, ((model, "second"), model.get_base_model())), (large, (separate[1], alone(model, None))), mode)


@pytest.mark.parametrize("mode", MODES)
def test_three_models_of_one_tree(mode):
    model = two_adapters()
    base, first, second = (alone(model, name) for name in (None, "default", "second"))
    check((model.get_base_model(), (model, (model, "second"))), (base, (first, second)), mode)
    check((model, ((model, "second"), model.get_base_model())), (first, (second, base)), mode)
    check((model, (model, "second")), (first, second), mode)
    check((model, (model, model.get_base_model())), (first, (copy.deepcopy(first), base)), mode)


@pytest.mark.parametrize("mode", MODES)
def test_two_peft_models_over_one_model(mode, tmp_path):
    large, model, small = tiny_llama(seed=LARGE), two_adapters(), tiny_llama()
    model.save_pretrained(tmp_path)
    expert = PeftModel.from_pretrained(small, tmp_path, adapter_name="expert").eval()
    other = PeftModel.from_pretrained(small, tmp_path / "second", adapter_name="other").eval()
    check((large, (expert, other)), (large, (alone(model, "default"), alone(model, "second"))), mode)


def test_settings_of_the_original_do_not_matter_and_stay():
    """A side that is named has its own adapter, whatever is active."""
    large, model = tiny_llama(seed=LARGE), two_adapters()
    separate = (alone(model, "default"), alone(model, "second"))
    model.set_adapter("second")
    check((large, ((model, "default"), (model, "second"))), (large, separate), "two_pass")
    assert model.active_adapters == ["second"]
    steered = svdecode.steer(large, pretrained=((model, "default"), (model, "second")), mu=1.0)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A["default"].weight.detach().clone())
    with pytest.raises(RuntimeError, match="a parameter was replaced"):
        steered(input_ids=IDS)


def test_what_is_no_pair_is_refused(tmp_path):
    large, model = tiny_llama(seed=LARGE), two_adapters()
    for pair in ((model, model), (model, (model, "default")), (model, copy.copy(model)), (large, large)):
        with pytest.raises(ValueError, match=r"are one model with the adapter.*adapter_name="):
            svdecode.steer(large, pretrained=pair, mu=1.0)
    with pytest.raises(ValueError, match="leave pretrained out"):
        svdecode.steer(model, pretrained=(model, "default"), mu=1.0)
    prompted = tiny_prompt("p-tuning")
    with pytest.raises(ValueError, match="leave pretrained out"):
        svdecode.steer(prompted, pretrained=prompted.get_base_model(), mu=1.0)
    with pytest.raises(ValueError, match="names the adapter 'third', and the model's adapters are default, second"):
        svdecode.steer(large, pretrained=((model, "third"), model), mu=1.0)
    with pytest.raises(ValueError, match="it is no PeftModel"):
        svdecode.steer(large, pretrained=(tiny_llama(), "default"), mu=1.0)


def test_one_that_changed_the_shared_weights_is_refused():
    large, model = tiny_llama(seed=LARGE), two_adapters()
    model.add_adapter(
        "third", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM")
    )
    for pair in ((model, model.get_base_model()), ((model, "default"), (model, "second"))):
        with pytest.raises(ValueError, match="init_lora_weights='olora'"):
            svdecode.steer(large, pretrained=pair, mu=1.0)
    merged = two_adapters()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        svdecode.steer(large, pretrained=(merged, merged.get_base_model()), mu=1.0)


def test_a_strength_of_an_adapter_is_not_one_of_two_models():
    adapter = tiny_lora()
    found = svdecode.calibrate(adapter, batches(), progress=False)
    with pytest.raises(ValueError, match=r"calibrated for an adapter .*calibrate these models, or pass a number"):
        svdecode.steer(tiny_llama(seed=1), pretrained=tiny_llama(seed=2), mu=found)
    plain = svdecode.calibrate(tiny_llama(seed=1), batches(), pretrained=tiny_llama(seed=2), progress=False)
    assert svdecode.steer(tiny_llama(seed=1), pretrained=tiny_llama(seed=2), mu=plain).mu == plain.mu
    assert svdecode.steer(adapter, mu=found).mu == found.mu


def test_a_strength_that_float32_cannot_hold_is_refused():
    for mu in (1e39, -1e300):
        with pytest.raises(ValueError, match="mu must be a float32 number"):
            svdecode.steer(tiny_lora(), mu=mu)
    steered = svdecode.steer(tiny_lora(), mu=1.0)
    with pytest.raises(ValueError, match="mu must be a float32 number"):
        steered.mu = 1e39
    assert steered.mu == 1.0
