"""An adapter on a base model of more or fewer layers than the one it was trained on is refused, however it names its layers."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import test_tuners
import torch
from evaluation_kit import tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_base_model import names
from tiny import PROMPTS, randomise, tiny_llama, tiny_lora
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import svdecode
from svdecode.cli.app import app
from svdecode.models.base_model import load_with_adapter
from svdecode.models.loading import load_adapter, load_another

DEEP = 2
LORA = {
    "all-linear": {"target_modules": "all-linear"},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ["model.layers.1.mlp.up_proj"]},
    "a pattern": {"target_modules": r".*\.(q_proj|v_proj)"},
    "a pattern with layers": {"target_modules": r".*\.[01]\.mlp\.up_proj"},
    "names": {"target_modules": ["q_proj"]},
    "one module": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "chosen layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "ranks": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "repeated layers": {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "an embedding": {"target_modules": ["embed_tokens"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4]}},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}


def llama(layers: int = DEEP, tied: bool = False) -> LlamaForCausalLM:
    config = tiny_llama().config
    config.num_hidden_layers, config.layer_types, config.tie_word_embeddings = layers, None, tied
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[int, Path]:
    """Folders of models of one to three layers."""
    root = tmp_path_factory.mktemp("bases")
    for layers in (1, DEEP, 3):
        tiny_tokenizer().save_pretrained(root / f"layers{layers}")
        llama(layers).save_pretrained(root / f"layers{layers}")
    return {layers: root / f"layers{layers}" for layers in (1, DEEP, 3)}


def saved(folder: Path, model: PeftModel, base: Path | None) -> Path:
    """The folder of an adapter, which names `base`."""
    model.save_pretrained(folder)
    names(folder, None if base is None else str(base))
    return folder


def lora(tied: bool = False, **options) -> PeftModel:
    model = get_peft_model(llama(tied=tied), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    torch.manual_seed(3)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("kind", LORA)
def test_the_named_base_decides(kind, bases, tmp_path):
    """Its configuration is at hand, and other depths are refused before a weight of the adapter is read."""
    adapter = saved(tmp_path / "adapter", lora(**LORA[kind]), bases[DEEP])
    load_with_adapter(None, adapter)
    for layers in (1, 3):
        sentence = (
            rf"was trained on .* with 2 layers in its text model, and this model has {layers}: use the model that it"
        )
        with pytest.raises(ValueError, match=sentence):
            load_with_adapter(str(bases[layers]), adapter)


@pytest.mark.parametrize("kind", ["all-linear", "all but one"])
def test_layers_that_are_named_one_by_one(kind, bases, tmp_path):
    """peft writes "all-linear" out; what the adapter was trained on is not here."""
    adapter = saved(tmp_path / "adapter", lora(**LORA[kind]), tmp_path / "gone")
    assert "model.layers.1.mlp.gate_proj" in json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    load_with_adapter(str(bases[DEEP]), adapter)
    with pytest.raises(
        ValueError, match=r"a model of 2 layers, whose modules it names one by one, and this model has 3"
    ):
        load_with_adapter(str(bases[3]), adapter)
    with pytest.raises(ValueError, match="does not fit the model: there is no place for"):
        load_with_adapter(str(bases[1]), adapter)
    names(adapter, str(tmp_path / "elsewhere" / bases[3].name))  # the way out that the message names
    load_with_adapter(str(bases[3]), adapter)


@pytest.mark.parametrize("kind", ["one module", "chosen layers", "a pattern with layers"])
def test_some_layers_of_a_deeper_base(kind, bases, tmp_path):
    """Legitimately without weights for the others."""
    model = get_peft_model(llama(3), LoraConfig(r=4, task_type="CAUSAL_LM", **LORA[kind]))
    load_with_adapter(str(bases[3]), saved(tmp_path / "adapter", model, bases[3]))
    load_with_adapter(str(bases[3]), saved(tmp_path / "adapter", model, None))


def test_tied_and_saved_embeddings(tmp_path):
    """A head that is saved beside the embedding it is tied to, and embeddings that were enlarged in training."""
    model = lora(tied=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    load_adapter(llama(tied=True), saved(tmp_path / "tied", model, None))
    base = llama()
    base.resize_token_embeddings(110)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "larger", save_embedding_layers=True)
    other = llama()
    other.resize_token_embeddings(110)
    load_adapter(other, tmp_path / "larger")


@pytest.mark.parametrize("name", [name for name in test_tuners.TUNERS if name not in test_tuners.REFUSED])
def test_every_tuner(name, tmp_path):
    """All but trained tokens and UniLoRA have a number of layers in what they save; for these the base must be at hand."""
    with contextlib.redirect_stderr(None):
        adapter = saved(tmp_path / "adapter", test_tuners.of_type(name), None)
    load_adapter(llama(), adapter)
    saved_base = tmp_path / "base"
    llama().config.save_pretrained(saved_base)
    for layers in (1, 3):
        names(adapter, str(saved_base) if name in ("TRAINABLE_TOKENS", "UNILORA") else None)
        with pytest.raises(ValueError, match=r"use the model that it was trained on$"):
            load_adapter(llama(layers), adapter)


def test_files_of_older_versions(tmp_path):
    """Mixtral's experts were modules of their own in transformers 4; peft translates, and nothing may be left over."""
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    shapes = {"self_attn.q_proj": (32, 32)}
    shapes |= {f"block_sparse_moe.experts.{e}.{w}": (32, 48) for e in range(2) for w in ("w1", "w3")}
    shapes |= {f"block_sparse_moe.experts.{e}.w2": (48, 32) for e in range(2)}
    weights = {}
    for layer in range(2):
        for name, (inputs, outputs) in shapes.items():
            where = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{where}.lora_A.weight"] = torch.randn(2, inputs)
            weights[f"{where}.lora_B.weight"] = torch.randn(outputs, 2)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    load_adapter(model, tmp_path)
    stray = weights["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].clone()
    save_file({**weights, "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": stray},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    model = MixtralForCausalLM(model.config)
    with pytest.raises(
        ValueError, match=r"no place for .*layers\.2\.self_attn\.q_proj.* \(1 weights have no place, 0 are"
    ):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_save_the_number_of_layers(kind, bases, tmp_path):
    adapter = saved(tmp_path / "adapter", get_peft_model(llama(), PROMPTS[kind]()), None)
    load_with_adapter(str(bases[DEEP]), adapter)
    for layers in (1, 3):
        with pytest.raises(ValueError, match=rf"with 2 layers in its text model, and this model has {layers}: use the"):
            load_with_adapter(str(bases[layers]), adapter)


def test_one_more_adapter_of_a_model(bases, tmp_path):
    first = saved(tmp_path / "first", lora(target_modules=["q_proj"]), None)
    second = saved(tmp_path / "second", lora(target_modules=["q_proj", "v_proj"]), None)
    model = load_another(load_adapter(llama(), first), second)
    assert model.active_adapter == "second"
    other = tmp_path / "other"
    shutil.copytree(second, other)
    weights = load_file(other / "adapter_model.safetensors")
    weights.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight")
    save_file(weights, other / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"nothing for .*layers\.1\.self_attn\.v_proj\.lora_B.* \(0 .*, 1 are missing\)"
    ):
        load_another(model, other)


def test_steer_of_a_model_that_peft_loaded(bases, tmp_path):
    """Nothing of ours has loaded it."""
    adapter = saved(tmp_path / "adapter", tiny_lora(target_modules=["model.layers.0.mlp.up_proj"]), bases[DEEP])
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(bases[3]), adapter)
    with pytest.raises(
        ValueError, match=r"the adapter 'default' was trained on .*layers2 with 2 layers in its text model"
    ):
        svdecode.steer(model, mu=1.0)
    svdecode.steer(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(bases[DEEP]), adapter), mu=1.0)


@pytest.mark.parametrize("command", ["generate", "calibrate", "explain", "eval"])
def test_every_command_refuses(command, bases, tmp_path):
    adapter = saved(tmp_path / "adapter", lora(**LORA["all-linear"]), tmp_path / "gone")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "what is w1", "completion": " w2 w3"}\n' * 3)
    words = {
        "generate": ["what is w1", "--mu", "1", "--max-new-tokens", "2"],
        "calibrate": ["--data", str(rows)],
        "explain": ["what is w1", "--mu", "1", "--json"],
        "eval": ["--task", "nll", "--data", str(rows), "--mu", "1"],
    }[command]
    found = CliRunner().invoke(app, [command, *words, "--adapter", str(adapter), "--model", str(bases[3])])
    assert "whose modules it names one by one, and this model has 3" in str(found.exception)
