"""Adapters whose creation, or loading, changes what they are put on: refused, and exact with the pre-trained model given."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as configurations
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from test_tuners import MODES
from tiny import batches, left_padded, randomise, tiny_llama, tiny_lora, two_model_logits

import svdecode

OPTIONS = {
    "pissa": {"init_lora_weights": "pissa"},
    "fast pissa": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
    "lora-ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "loftq": {},
    "replication": {"layer_replication": [(0, 2), (1, 2)]},
    "biases": {"bias": "all"},
}
OLDEST = not hasattr(configurations, "KasaConfig")  # peft 0.19
if not OLDEST:
    OPTIONS["kasa"] = {"kasa_config": configurations.KasaConfig()}
IDS, MASK = left_padded()


def config(kind):
    return LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **copy.deepcopy(OPTIONS[kind])
    )


def adapted(kind):
    base = tiny_llama()
    if kind == "loftq":  # peft quantises with bitsandbytes, on a GPU
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.peft_config["default"].init_lora_weights = "loftq"
        base.model.layers[0].self_attn.q_proj.base_layer.weight.data *= 0.9
    else:
        options = config(kind)
        if kind == "corda":
            preprocess_corda(base, options, run_model=lambda: base(torch.randint(3, 97, (1, 100))))
        if kind == "lora-ga":
            preprocess_loraga(base, options, lambda: base(IDS, labels=IDS).loss.backward())
        model = get_peft_model(base, options)
    randomise(model, 0.1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", OPTIONS)
def test_refused_and_exact_with_the_pretrained_model(kind, tmp_path):
    model, pretrained = adapted(kind), tiny_llama()
    with model.disable_adapter():
        changed = (model(IDS).logits - pretrained(IDS).logits).abs().max()
    assert changed > 0.01 or kind == "biases"  # llama has none
    model.save_pretrained(tmp_path)
    given = [model]
    if kind not in ("corda", "lora-ga", "loftq"):  # the first two want their statistics again
        given.append(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval())
    for one in given:
        with pytest.raises(ValueError, match=r"so that what lies under it is not the pre-trained model.*pretrained="):
            svdecode.steer(one, mu=1.0)
        with pytest.raises(ValueError, match="pretrained="):
            svdecode.calibrate(one, batches(1), progress=False)
        expected = two_model_logits(copy.deepcopy(one), IDS, MASK)[1]
        for mode in MODES[1:]:
            steered = svdecode.steer(one, pretrained=pretrained, mu=1.0, mode=mode)
            positions = (MASK.cumsum(-1) - 1).clamp(min=0)
            pre, ft, _ = steered.pair_logits(input_ids=IDS, attention_mask=MASK, position_ids=positions)
            torch.testing.assert_close(ft[:, -1], expected[:, -1], rtol=1e-3, atol=1e-3)
            for row, used in zip(range(3), MASK.bool(), strict=True):
                alone = pretrained(IDS[row, used][None]).logits[0, -1]
                torch.testing.assert_close(pre[row, -1], alone, rtol=1e-3, atol=1e-3)
        assert svdecode.calibrate(one, batches(1), pretrained=pretrained, progress=False).mean_kl > 0


def test_an_idle_adapter_has_changed_the_weights_too():
    model = tiny_lora()
    model.add_adapter(
        "second", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM")
    )
    assert model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="the adapter 'second' was made with init_lora_weights='olora'"):
        svdecode.steer(model, mu=1.0)


def test_adapters_that_transformers_added():
    model = tiny_llama()
    try:
        model.add_adapter(config("pissa"))
    except ValueError as error:  # transformers 5.24 asks for a peft that is not out yet
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        svdecode.steer(model, mu=1.0)


@torch.no_grad()
def test_what_peft_converted_back_is_an_ordinary_adapter(tmp_path):
    model = get_peft_model(tiny_llama(), config("pissa")).eval()
    model.peft_config["default"].init_lora_weights = True  # as peft's guide says, for the start alone
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    randomise(model, 0.1)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "ordinary", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ordinary = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ordinary").eval()
    pre, ft, _ = svdecode.steer(ordinary, mu=1.0).pair_logits(input_ids=IDS)
    torch.testing.assert_close(ft, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pre, tiny_llama()(IDS).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", *([] if OLDEST else ["mica"]), True, False])
def test_other_starts_leave_the_weights_alone(init):
    options = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    steered = svdecode.steer(get_peft_model(tiny_llama(), options).eval(), mu=1.0)
    torch.testing.assert_close(steered.pair_logits(input_ids=IDS)[0], tiny_llama()(IDS).logits, rtol=1e-3, atol=1e-3)
