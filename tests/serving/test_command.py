"""`svdecode serve` up to the server: what its words become of vLLM's options."""

from __future__ import annotations

import shutil

import kit
import pytest
import torch
from typer.testing import CliRunner

from svdecode.cli import serve
from svdecode.cli.app import app


@pytest.fixture
def llama(models, tmp_path):
    return shutil.copytree(kit.tiny(models, "llama"), tmp_path / "llama")


@pytest.fixture
def options(monkeypatch):
    """Of the server that would be started."""

    def parsed(*words):
        found = []
        monkeypatch.setattr(serve, "_run", found.append)
        result = CliRunner().invoke(app, ["serve", *map(str, words)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return found[0]

    return parsed


def test_the_model_may_stand_anywhere(llama, options):
    adapter = ["--adapter", llama / "lora", "--mu", "0.7"]
    for words in ([llama, *adapter], [*adapter, "--max-model-len", "128", llama], [*adapter, "--model", llama]):
        given = options(*words)
        assert given.model == str(llama)
        assert given.hf_overrides["architectures"] == ["SteeredLlamaForCausalLM"]
        assert given.hf_overrides["svdecode"]["mu"] == 0.7
    assert options(*adapter, "--max-model-len", "128", llama).max_model_len == 128
    with pytest.raises(ValueError, match="two models are named"):
        options(llama, *adapter, "--model", "other")


TO_20000 = [
    ["--hf-overrides.rope_theta", "20000"],
    ["--hf_overrides", '{"rope_theta": 20000}'],
    ['--hf-overrides={"rope_theta": 20000}'],
]


@pytest.mark.parametrize("words", TO_20000)
def test_overrides_of_the_users_own_are_kept(llama, options, words):
    given = options(llama, "--adapter", llama / "lora", "--mu", "0.7", *words)
    assert given.hf_overrides["rope_theta"] == 20000
    assert given.hf_overrides["architectures"] == ["SteeredLlamaForCausalLM"]


@pytest.mark.parametrize("words", [["--enable-lora"], ["--enable_lora"], ["--model-impl", "transformers"]])
def test_what_cannot_be_combined_is_refused_here(llama, options, words):
    with pytest.raises(ValueError, match="a steered model cannot be served with"):
        options(llama, "--adapter", llama / "lora", "--mu", "0.7", *words)


def test_the_tokenizer_beside_the_adapter(llama, options):
    words = [llama, "--adapter", llama / "lora", "--mu", "0.7"]
    assert options(*words).tokenizer is None
    kit.tokenizer().save_pretrained(llama / "lora")
    assert options(*words).tokenizer == str(llama / "lora")
    assert options(*words, "--tokenizer", llama).tokenizer == str(llama)
    large = kit.tokenizer()
    large.add_tokens([f"new{i}" for i in range(8)])
    large.save_pretrained(llama / "lora")
    with pytest.raises(ValueError, match="has 520 tokens, the model 512"):
        options(*words)


@pytest.mark.parametrize(("capability", "dtype"), [("AVX2", "float32"), ("AVX512", "auto")])
def test_the_dtype_that_the_cpu_is_fast_at(llama, options, monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    words = [llama, "--adapter", llama / "lora", "--mu", "0.7"]
    assert options(*words).dtype == dtype
    assert options(*words, "--dtype", "bfloat16").dtype == "bfloat16"
