"""Every program in `examples/`, run as a user runs it, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[1] / "examples"
TESTED = {"quickstart.py", "own_logits.py", "contrastive.py", "dpo.py", "warm_start.sh"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama whose tokens are single characters, so that it can spell what the examples say."""
    folder = tmp_path_factory.mktemp("model")
    characters = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(32, 125))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    tiny = tiny_llama(vocabulary=len(characters))
    tiny.lm_head.weight.data *= 0.1  # nearly flat: gold tokens are in the kept set
    tiny.save_pretrained(folder)
    return folder


def run(*command: object, folder: Path, **environment: str) -> str:
    """What a program prints; its exit status must be 0."""
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=everything, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == TESTED


def test_quickstart(model, tmp_path):
    settings = {"SVDECODE_EXAMPLE_MODEL": str(model), "SVDECODE_EXAMPLE_STEPS": "4", "TMPDIR": str(tmp_path)}
    text = run(sys.executable, EXAMPLES / "quickstart.py", folder=tmp_path, **settings)
    assert "Calibration(mu=" in text
    assert len(re.findall(r"^ +steered: Capital of \w+:'.*'$", text, re.MULTILINE)) == 4, text
    assert json.loads(next(tmp_path.glob("svdecode-*/svdecode.json")).read_text())["num_sequences"] == 8


def test_own_logits_learns(tmp_path):
    text = run(sys.executable, EXAMPLES / "own_logits.py", folder=tmp_path, SVDECODE_EXAMPLE_STEPS="30")
    losses = [float(value) for value in re.findall(r"NLL (\d+\.\d+)", text)]
    strengths = [float(value) for value in re.findall(r"mu (-?\d+\.\d+)", text)]
    assert losses[-1] < losses[0] / 10, text
    assert strengths[0] == 0.5 != strengths[-1], text
    assert int(re.search(r"right answers: (\d+)%", text)[1]) > 90


def test_contrastive(model, tmp_path):
    amateur = tmp_path / "amateur"
    shutil.copytree(model, amateur)
    tiny_llama(vocabulary=97, seed=1).save_pretrained(amateur)
    settings = {"SVDECODE_EXAMPLE_MODEL": str(model), "SVDECODE_EXAMPLE_AMATEUR": str(amateur)}
    text = run(sys.executable, EXAMPLES / "contrastive.py", "once upon", folder=tmp_path, **settings)
    assert re.search(r"^expert: 'once upon", text, re.MULTILINE), text
    assert re.search(r"^contrastive: 'once upon", text, re.MULTILINE), text
    assert re.search(r"sat out \d+% of the steps \(mode lazy\)", text), text


def test_dpo(model, tmp_path):
    """The reference is the model before training: the first margin is 0, and it grows."""
    text = run(
        sys.executable,
        EXAMPLES / "dpo.py",
        folder=tmp_path,
        SVDECODE_EXAMPLE_MODEL=str(model),
        SVDECODE_EXAMPLE_STEPS="4",
    )
    margins = [float(value) for value in re.findall(r"margin (-?\d+\.\d+)", text)]
    assert margins[0] == 0, text
    assert margins == sorted(margins), text
    assert margins[-1] > 0.01, text
    assert re.search(r"^steered further: 'The capital of Norway", text, re.MULTILINE), text


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_warm_start_in_the_shell(model, tmp_path):
    settings = {"MODEL": str(model), "SVDECODE": f"{sys.executable} -m svdecode"}
    run("bash", EXAMPLES / "warm_start.sh", folder=tmp_path, **settings)
    output = tmp_path / "warm-start-output"
    assert (output / "adapter_model.safetensors").is_file()
    assert json.loads((output / "svdecode.json").read_text())["num_tokens"] > 0
    found = json.loads((output / "eval" / "results.json").read_text())["results"]["NLL"]
    assert {"pre-trained", "warm start"} <= set(found)
