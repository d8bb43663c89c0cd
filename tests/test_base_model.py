"""The base model that an adapter names is the one that is loaded; another one is warned about, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluation_kit import tiny_tokenizer
from peft import LoraConfig, get_peft_model
from tiny import randomise, tiny_llama

from svdecode.cli.generate import generate
from svdecode.models.base_model import load_base, load_with_adapter, named_base


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base model, another one of the same shapes, and an adapter trained on the first."""
    root = tmp_path_factory.mktemp("models")
    base, other, adapter = (root / name for name in ("base", "other", "adapter"))
    for seed, folder in enumerate((base, other)):
        tiny_tokenizer().save_pretrained(folder)
        tiny_llama(seed=seed).save_pretrained(folder)
    model = get_peft_model(
        tiny_llama(),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(base)),
    )
    torch.manual_seed(3)
    randomise(model)
    model.save_pretrained(adapter)
    names(adapter, str(base))
    return base, other, adapter


def names(adapter: Path, base: str | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


def embedding(model) -> torch.Tensor:
    return model.get_input_embeddings().weight.float().cpu()


def test_the_named_base_is_the_default(folders, capsys):
    base, _, adapter = folders
    model, _ = load_with_adapter(None, adapter)
    assert torch.equal(embedding(model), embedding(load_base(str(base), None)[0]))
    generate(prompt="what is w1", adapter=adapter, mu=0.5, max_new_tokens=2, as_json=True)
    found = capsys.readouterr()
    assert json.loads(found.out)["model"] == str(base)
    assert "svdecode:" not in found.err


def test_another_model_is_warned_about(folders, capsys):
    base, other, adapter = folders
    load_base(str(base), adapter)
    assert "svdecode:" not in capsys.readouterr().err
    model, _ = load_base(str(other), adapter)
    assert torch.equal(embedding(model), embedding(load_base(str(other), None)[0]))
    assert f"was trained on {base}, and --model is {other}" in capsys.readouterr().err


def test_a_base_that_is_not_there(folders, tmp_path):
    moved = tmp_path / "adapter"
    shutil.copytree(folders[2], moved)
    names(moved, str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"was trained on .*gone, which cannot be loaded here .* with --model"):
        load_base(None, moved)
    names(moved, None)
    assert named_base(moved) is None


def test_weights_that_do_not_fit_are_refused(folders, tmp_path):
    """peft leaves out weights that the model has no place for, and starts new ones for layers that the file lacks."""
    adapter = tmp_path / "adapter"
    shutil.copytree(folders[2], adapter)
    names(adapter, str(tmp_path / "gone"))  # test_adapter_fit.py: its base is at hand
    for layers in (1, 3):
        folder = tmp_path / f"layers{layers}"
        tiny_tokenizer().save_pretrained(folder)
        config = tiny_llama().config
        config.num_hidden_layers, config.layer_types = layers, None
        type(tiny_llama())(config).save_pretrained(folder)
        with pytest.raises(ValueError, match="does not fit the model: there is n"):
            load_with_adapter(str(folder), adapter)
