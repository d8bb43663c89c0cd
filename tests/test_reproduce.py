"""bench/reproduce.sh, whole, on a tiny model: the learning rate with the lowest NLL is taken, and the table is made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_kit import tiny_tokenizer, write_truthful
from tiny import tiny_llama

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_pipeline_with_a_searched_rate(tmp_path):
    model, runs = tmp_path / "a model", tmp_path / "runs"
    tiny_tokenizer().save_pretrained(model)
    tiny_llama().save_pretrained(model)
    data = write_truthful(tmp_path / "t.csv", 40)
    environment = {
        **os.environ, "MODEL": str(model), "METHODS": "lora", "RATES": "tuned", "CANDIDATES": "1e-2 1e-6", "LIMIT": "3",
        "FRACTIONS": "0.4/0.3/0.3", "PYTHON": sys.executable, "SVDECODE": f"{sys.executable} -m svdecode",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    script = ["bash", "bench/reproduce.sh", "truthfulqa_mc", str(data), str(runs)]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    nll = {
        rate: json.loads((runs / "tuned" / f"lora-{rate}" / "nll" / "results.json").read_text())["results"]["NLL"]
        for rate in ("1e-2", "1e-6")
    }
    assert nll["1e-2"]["warm start"]["mean"] < nll["1e-6"]["warm start"]["mean"]
    assert (runs / "tuned" / "lora").read_text() == "1e-2\n"
    settings = json.loads((runs / "lora-tuned" / "svdecode-warmstart.json").read_text())["settings"]
    assert settings["learning_rate"] == 1e-2
    assert sorted(path.name for path in runs.iterdir()) == ["lora-tuned", "tuned"]
    table = [sys.executable, "bench/reproduce_table.py", str(runs), "truthfulqa_mc"]
    lines = subprocess.run(table, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| lora | 0.01 |")
    before = sorted(path.stat().st_mtime_ns for path in runs.rglob("*"))
    subprocess.run(script, cwd=ROOT, env=environment, check=True)  # all done: nothing is run again
    assert sorted(path.stat().st_mtime_ns for path in runs.rglob("*")) == before
