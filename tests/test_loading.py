"""Where models go: one device, the launcher's own card, or several by a device map."""

from __future__ import annotations

import pytest
import torch
from evaluation_kit import tiny_tokenizer
from tiny import tiny_llama, tiny_lora

import svdecode
from svdecode.models import loading


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_lora().save_pretrained(folder / "adapter")
    return folder


def test_a_device_map_changes_nothing_on_one_device(places):
    ids = torch.tensor([[5, 6, 7]])
    found = []
    for device_map in (None, "auto"):
        model, _ = loading.load_model(str(places / "model"), device_map)
        steered = svdecode.steer(loading.load_adapter(model, places / "adapter"), mu=1.0)
        found.append(steered.generate(ids, max_new_tokens=6, do_sample=False).tolist())
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="device_map must be one of auto, balanced, sequential, got 'cuda:7'"):
        loading.load_model(str(places / "model"), "cuda:7")


def test_each_process_takes_its_own_card(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.device() == torch.device("cpu")


def test_a_missing_adapter_is_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from svdecode.cli.app import app

    data = tmp_path / "x.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for command in (["calibrate", "--data", data], ["generate", "a", "--mu", "1"]):
        found = CliRunner().invoke(app, [*map(str, command), "--adapter", str(tmp_path / "none")])
        assert "adapter_config.json is missing" in str(found.exception)
    assert not (tmp_path / "none").exists()
