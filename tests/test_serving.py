"""What of serving needs no vLLM: the adapter's folder, the settings, and what a machine without vLLM is told."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import randomise, tiny_llama, tiny_lora

from svdecode.models.adapters import adapter_fingerprint
from svdecode.models.loading import load_adapter
from svdecode.ops.setting import Setting
from svdecode.serving import saved_adapter
from svdecode.serving.names import KEY
from svdecode.serving.settings import Served
from svdecode.serving.streams import ADAPTED, PRETRAINED, as_pairs, as_rows, both, twice


def test_a_lora_is_taken(tmp_path):
    tiny_lora().save_pretrained(tmp_path)
    saved_adapter.check(tmp_path)


REFUSED = {
    "is IA3": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "is PREFIX_TUNING": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "is a DoRA": lambda: LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "saves whole modules": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "output head": lambda: LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "embed_tokens": lambda: LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    "biases": lambda: LoraConfig(target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM"),
    "takes its start out of the weights": lambda: LoraConfig(
        target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    ),
    "embeddings of tokens": lambda: LoraConfig(
        target_modules=["q_proj"], trainable_token_indices=[3], task_type="CAUSAL_LM"
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_vllm_cannot_hold_is_refused_with_the_way_out(words, tmp_path):
    model = get_peft_model(tiny_llama(), REFUSED[words]())
    randomise(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{words}.*merge_and_unload.*svdecode\.steer"):
        saved_adapter.check(tmp_path)


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        saved_adapter.check(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"adapter_config\.json is not the configuration of an adapter: peft_type is None"
    ):
        saved_adapter.check(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        saved_adapter.check(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a file of weights: "):
        saved_adapter.check(tmp_path)


def test_the_depth_of_the_model(tmp_path):
    """A number of layers needs no vLLM either."""
    model = tiny_lora()
    model.save_pretrained(tmp_path)
    saved_adapter.check_layers(tmp_path, tiny_llama().config)
    deeper = tiny_llama().config
    deeper.num_hidden_layers = 3
    with pytest.raises(
        ValueError, match="a model of 2 layers, whose modules it names one by one, and this model has 3"
    ):
        saved_adapter.check_layers(tmp_path, deeper)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_is_that_of_the_loaded_adapter(dtype, tmp_path):
    tiny_lora().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    assert saved_adapter.fingerprint(tmp_path) == adapter_fingerprint(load_adapter(tiny_llama(), tmp_path))


def config(values):
    return type("Config", (), {KEY: values})


def test_settings_survive_json(tmp_path):
    for penalty in (-math.inf, -2.0):
        served = Served(tmp_path, Setting(0.5, 0.2, penalty, "log_ratio"), floor=False)
        assert Served.of(config(json.loads(json.dumps(served.to_config())))) == served


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "needs its settings"),
        ({"mu": 0.5}, "needs its settings"),
        ({"adapter": "x", "mu": 0.5, "alpa": 0.1}, "alpa is unknown"),
        ({"adapter": "x", "mu": 0.5, "alpha": 2}, "alpha must be in"),
        ({"adapter": "x", "mu": 0.5, "floor": "no"}, "floor must be true or false"),
    ],
)
def test_wrong_settings(values, words):
    with pytest.raises(ValueError, match=words):
        Served.of(config(values))


def test_streams_lie_side_by_side():
    x = torch.arange(6.0).view(3, 2)
    rows = twice(x, 0)
    assert torch.equal(both(rows)[:, PRETRAINED], x)
    assert torch.equal(both(rows)[:, ADAPTED], x)
    assert torch.equal(as_pairs(rows), torch.cat([x, x], 1))
    assert torch.equal(as_rows(as_pairs(rows)), rows)
    assert as_pairs(rows).data_ptr() == rows.data_ptr()
    assert twice(torch.tensor([[7]]), -1).stride() == (2, 1)  # a token alone: no view of stride 0


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_entry_point_imports_nothing_heavy():
    """vLLM loads it in every process of every engine."""
    done = python(
        "import sys, svdecode.serving.registration; print({'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert done.stdout == "set()\n", done.stderr


def test_without_vllm_one_line_says_so(tmp_path):
    pytest.importorskip("typer")
    code = (
        "import sys; sys.modules['vllm'] = None; from importlib import metadata\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = missing\n"
        "from svdecode.constants import VERSION; from svdecode.cli.app import main\n"
        f"sys.argv = ['svdecode', 'serve', 'model', '--adapter', {str(tmp_path)!r}]; main()"
    )
    done = python(code)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "serving needs vLLM: pip install 'svdecode[vllm]'" in done.stderr
