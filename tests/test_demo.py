"""The command line and the demo, from end to end, on a tiny model and a tiny task."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import EOS, PAD, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from svdecode.ops import compiled

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "what", "is", "?", "answer"] + [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    assert (fast.pad_token_id, fast.eos_token_id) == (PAD, EOS)
    fast.save_pretrained(folder)
    tiny_llama(vocabulary=len(WORDS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"what is w{i} ?", "completion": f"w{(7 * i) % 40} w{i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "svdecode", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_demo_runs_caches_and_reports(tiny_model, examples, tmp_path):
    output = tmp_path / "out"
    arguments = ("demo", "--model", tiny_model, "--data", examples, "--output", output)
    first = run(*arguments, "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["examples"] == {"train": 24, "calibration": 8, "test": 8}
    assert [row["step"] for row in report["steps"]] == [6]
    assert set(report["exact_match"]) == {"pre-trained", "warm start", "SVDecode"}
    assert all(speed > 0 for speed in report["tokens_per_second"].values())
    assert Path(report["figure"]).read_bytes()[:4] == b"\x89PNG"
    assert json.loads((output / "adapter" / "svdecode.json").read_text())["mu"] == report["mu"]
    weights = (output / "adapter" / "adapter_model.safetensors").read_bytes()

    second = run(*arguments)
    assert second.returncode == 0, second.stderr
    assert "exact match" in second.stdout
    assert "step/s" in first.stderr
    assert "step/s" not in second.stderr  # no training bar: the saved adapter was taken
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    again = json.loads((output / "demo.json").read_text())
    assert again["mu"] == pytest.approx(report["mu"])
    for name in ("warm start", "SVDecode", "coverage"):
        assert again["held_out"][name] == pytest.approx(report["held_out"][name])

    other = run(
        "demo", "--model", tiny_model, "--data", examples, "--adapter", output / "adapter", "--output", tmp_path / "b"
    )
    assert other.returncode == 0, other.stderr
    assert not (tmp_path / "b" / "adapter").exists()


def test_warmstart_calibrate_generate(tiny_model, examples, tmp_path):
    adapter = tmp_path / "adapter"
    shared = ("--model", tiny_model)
    trained = run("warmstart", *shared, "--data", examples, "--output", adapter, "--learning-rate", "1e-2")
    assert trained.returncode == 0, trained.stderr
    early = run("generate", "what is w3 ?", *shared, "--adapter", adapter)
    assert early.returncode == 2
    assert "svdecode.json is missing" in early.stderr
    calibrated = run(
        "calibrate", *shared, "--data", examples, "--adapter", adapter, "--json", "--plot", tmp_path / "c.png"
    )
    assert calibrated.returncode == 0, calibrated.stderr
    assert set(json.loads(calibrated.stdout)["estimates"]) == {"mean", "median", "trimmed", "ratio", "newton", "exact"}
    assert (tmp_path / "c.png").exists()
    answered = run("generate", "what is w3 ?", *shared, "--adapter", adapter, "--max-new-tokens", "4")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()


def test_info():
    found = json.loads(run("info", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"]
    assert found["backends"]["reference"]["available"]
    assert found["backends"]["cuda"]["available"] == (compiled.CUDA_IS_EMULATED or torch.cuda.is_available())
    assert found["backends"]["cuda"]["reason"]
    assert "reference" in run("info").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--data", "missing.jsonl"], "missing.jsonl is not a file"),
        (["demo", "--model", "no/such-model"], "cannot load the model no/such-model"),
        (["demo", "--model", "."], "config.json is missing"),
        (["calibrate", "--data", "{data}", "--adapter", ".", "--model", "{model}"], "adapter_config.json is missing"),
        (
            ["calibrate", "--data", "{data}", "--adapter", ".", "--model", "{model}", "--alpha", "2"],
            "adapter_config|alpha",
        ),
        (["generate", "hi", "--adapter", "nowhere"], "no calibration in nowhere"),
        (["warmstart", "--data", "{empty}", "--output", "o"], "data is empty"),
        (["warmstart", "--data", "{broken}", "--output", "o"], "line 2: not JSON"),
        (["demo", "--nonsense"], "No such option"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, words, tiny_model, examples, tmp_path):
    import re

    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    places = {
        "model": tiny_model,
        "data": examples,
        "empty": tmp_path / "empty.jsonl",
        "broken": tmp_path / "broken.jsonl",
    }
    result = subprocess.run(
        [sys.executable, "-m", "svdecode", *(a.format(**places) for a in arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 2
    assert re.search(words, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
