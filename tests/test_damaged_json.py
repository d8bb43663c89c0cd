"""JSON files that somebody has edited or that a disk has damaged: one sentence that names the file, before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import batches, tiny_lora
from typer.testing import CliRunner

import svdecode
from svdecode.cli.app import app
from svdecode.common.files import LARGEST_JSON
from svdecode.models import base_model, loading
from svdecode.models.loading import check_adapter_folder
from svdecode.serving import saved_adapter
from svdecode.strength.storage import FILE_NAME

DAMAGED = {
    "nested too deeply": "[" * 100_000 + "]" * 100_000,
    "nested too deeply, in an object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "it holds [1], which is no object": "[1]",
    "it holds 3, which is no object": "3",
    'it holds "x", which is no object': '"x"',
    "it holds null, which is no object": "null",
    "NaN is not a finite number": '{"mu": NaN}',
    "-Infinity is not a finite number": '{"penalty": -Infinity}',
    "1e999 is not a finite number": '{"mu": 1e999}',
    "it has 'mu' twice": '{"mu": 1, "mu": 2}',
    "it has 'a' twice": '{"x": {"a": 1, "a": 1}}',
    "has 400 digits": '{"num_tokens": ' + "9" * 400 + "}",
    "has 5000 digits": '{"num_tokens": ' + "9" * 5000 + "}",
    "can't decode byte 0xff": b'{"mu": "\xff"}',
    "can't decode byte 0xff in position 0": b"\xff\xfe{\x00}\x00",
    "Expecting value: line 1 column 1": "",
    "Expecting ',' delimiter": '{"mu": 1',
}  # fmt: skip


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def one_sentence(error: BaseException, path: Path, words: str) -> None:
    text = str(error)
    assert str(path) in text
    assert words.split(", in")[0] in text
    assert "\n" not in text
    assert len(text) < 400


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """With a calibration."""
    folder, model = tmp_path_factory.mktemp("adapter"), tiny_lora()
    model.save_pretrained(folder)
    svdecode.calibrate(model, batches(), progress=False).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("words", DAMAGED)
def test_a_calibration(words, tmp_path):
    path = tmp_path / FILE_NAME
    write(path, DAMAGED[words])
    with pytest.raises(ValueError, match=r"svdecode\.json is not a calibration: ") as raised:
        svdecode.Calibration.from_pretrained(tmp_path)
    one_sentence(raised.value, path, words)


@pytest.mark.parametrize("words", DAMAGED)
def test_the_configuration_of_an_adapter(words, copy):
    path = copy / "adapter_config.json"
    write(path, DAMAGED[words])
    for read in (check_adapter_folder, base_model.named_base, saved_adapter.check):
        with pytest.raises(
            ValueError, match=r"adapter_config\.json is not the configuration of an adapter: "
        ) as raised:
            read(copy)
        one_sentence(raised.value, path, words)


@pytest.mark.parametrize("name", [FILE_NAME, "adapter_config.json"])
def test_what_is_no_file_or_too_large_is_not_read(name, copy, monkeypatch):
    read = svdecode.Calibration.from_pretrained if name == FILE_NAME else check_adapter_folder
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is not .*: it is a folder"):
        read(copy)
    (copy / name).rmdir()
    with (copy / name).open("wb") as file:
        file.truncate(100 * 2**20)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(
        ValueError, match=rf"{name} is not .*: it has 104,857,600 bytes, and more than {LARGEST_JSON:,} are"
    ):
        read(copy)


WRONG = [
    ("mu", "0.5", "mu must be a number, got \"0.5\""),
    ("mu", True, "mu must be a number, got true"),
    ("mu", None, "mu must be a number, got null"),
    ("mu", [0.5], "mu must be a number, got \\[0.5\\]"),
    ("mu", "nan", "contradict"),
    ("alpha", {}, "alpha must be a number, got {}"),
    ("alpha", 2, "contradict"),
    ("estimator", 3, "estimator must be a text, got 3"),
    ("estimator", "none", "contradict"),
    ("estimates", [1], "estimates must be an object in braces, got \\[1\\]"),
    ("estimates", {"exact": "x"}, "estimates must be a number, got \"x\""),
    ("direction", 1, "direction must be a text, got 1"),
    ("direction", "up", "contradict"),
    ("num_tokens", 2.5, "num_tokens must be a whole number, got 2.5"),
    ("num_tokens", 0, "contradict"),
    ("intervals", {"exact": 1}, "intervals must be a list of numbers, got 1"),
    ("intervals", {"exact": [0.1]}, "contradict"),
    ("intervals", {"exact": [0.1, "x"]}, "intervals must be a number, got \"x\""),
    ("gains", {"calibration": 1}, "gains must be an object in braces, got 1"),
    ("mu_star_quantiles", 0, "mu_star_quantiles must be an object in braces, got 0"),
    ("adapter", 7, "adapter must be a text, got 7"),
    ("selection", [], "selection must be an object in braces, got \\[\\]"),
    ("penalty", "low", "penalty must be a number, got \"low\""),
    ("schema", [2], "schema \\[2\\] is not 3"),
    ("tokens_sha256", 5, "must be a text, got 5"),
    ("new", 1, "'new' is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_values_of_a_calibration(name, value, words, copy):
    path = copy / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=rf"svdecode\.json is not a calibration: .*{words}"):
        svdecode.Calibration.from_pretrained(copy)


def test_a_missing_value(copy):
    path = copy / FILE_NAME
    values = json.loads(path.read_text())
    del values["coverage"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"svdecode\.json is not a calibration: coverage is missing"):
        svdecode.Calibration.from_pretrained(copy)


def test_infinities_come_back_as_numbers(copy):
    saved = svdecode.Calibration.from_pretrained(copy)
    saved.penalty, saved.mu_star_quantiles["0.5"] = -torch.inf, torch.inf
    saved.intervals["exact"] = [-torch.inf, 1.0]
    saved.save_pretrained(copy)
    read = svdecode.Calibration.from_pretrained(copy)
    assert (read.penalty, read.mu_star_quantiles["0.5"], read.intervals["exact"]) == (
        -torch.inf,
        torch.inf,
        [-torch.inf, 1.0],
    )
    assert read.to_dict() == saved.to_dict()


@pytest.mark.parametrize("name", [FILE_NAME, "adapter_config.json"])
@pytest.mark.parametrize("command", [["generate", "a"], ["explain", "a", "--json"]])
def test_said_before_a_model_is_loaded(command, name, copy, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(base_model, "load_model", lambda *_: pytest.fail("a model was loaded"))
    write(copy / name, "[" * 100_000)
    found = CliRunner().invoke(app, [*command, "--adapter", str(copy)])
    assert f"{name} is not" in str(found.exception)
    assert "nested too deeply" in str(found.exception)
