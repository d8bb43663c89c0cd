"""`svdecode eval`: the command, the gain over warm-start steps, two processes, and what is wrong in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from evaluation_kit import (
    calibration,
    commonsense_rows,
    quiet,
    tiny_tokenizer,
    write_json,
    write_truthful,
)
from peft import PeftModel
from tiny import tiny_llama, tiny_lora

import svdecode
from svdecode.evaluation.steps import evaluate_steps
from svdecode.models.loading import load_adapter, load_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """(model folder, folder with an adapter and checkpoints step-1 and step-2, each calibrated)."""
    base = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(base)
    tiny_llama().save_pretrained(base)
    adapters = tmp_path_factory.mktemp("adapter")
    for place, scale in ((adapters, 1.0), (adapters / "step-1", 0.3), (adapters / "step-2", 0.6)):
        model = tiny_lora()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(scale)
        model.save_pretrained(place)
        calibration(model, tokenizer).save_pretrained(place)
    return base, adapters


def command(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-m", "svdecode", "eval", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=environment)


def here(*arguments) -> None:
    """The command in this process, which saves the imports: what it prints, and its ValueErrors as they are."""
    import typer

    from svdecode.cli.evaluate import evaluate as eval_command

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(eval_command)
    app(list(map(str, arguments)), standalone_mode=False)


def test_the_command(folders, tmp_path, capsys):
    base, adapter = folders
    data = write_truthful(tmp_path / "t.csv", 10)
    shared = ("--task", "truthfulqa_mc", "--data", data, "--model", base, "--adapter", adapter, "--limit", 3)
    first = command(*shared, "--output", tmp_path / "out", "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["questions"] == 3
    assert "SVDecode (mean)" in report["results"]["MC1"]
    assert "tokens/s" in first.stderr
    here(*shared, "--output", tmp_path / "out")
    printed = capsys.readouterr()
    assert "warm start" in printed.out
    assert "no gain is shown" in printed.out
    assert "question/s" not in printed.err  # all of it was done


def test_gain_over_warm_start_steps(folders, tokenizer, tmp_path, capsys):
    base, adapter = folders
    test, held = (
        write_json(tmp_path / "t.json", commonsense_rows(9)),
        write_json(tmp_path / "c.json", commonsense_rows(9, 5)),
    )
    shared = ("--task", "arc_easy", "--score", "choices", "--data", test, "--model", base, "--steps", adapter)
    here(*shared, "--calibration-data", held, "--output", tmp_path / "out", "--json")
    rows = json.loads(capsys.readouterr().out)["steps"]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["nll"]["warm start"] != rows[1]["nll"]["warm start"]
    assert {"steps.json", "steps.md", "steps.png", "step-1", "step-2"} <= {p.name for p in (tmp_path / "out").iterdir()}

    second = PeftModel.from_pretrained(tiny_llama(), adapter / "step-2")  # alone, without step-1 loaded before it
    alone = evaluate_steps(
        "arc_easy", test, adapter, lambda folder: PeftModel.from_pretrained(tiny_llama(), folder), tokenizer,
        calibration_data=held, score="choices", progress=False,
    )  # fmt: skip
    for one, other in zip(rows, alone, strict=True):
        assert one["mu"] == pytest.approx(other["mu"], rel=1e-4)
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-4)
    report = quiet("arc_easy", test, second, tokenizer, score="choices", mu=alone[1]["mu"])
    assert rows[1]["metric"]["warm start"]["mean"] == report.results["accuracy"]["warm start"]["mean"]
    with pytest.raises(ValueError, match="calibration questions are test questions too"):
        here(*shared, "--calibration-data", test)


WORKER = """
import sys
from pathlib import Path
from accelerate import PartialState
PartialState(cpu=True)  # gloo, also where there is a GPU
from svdecode import Calibration
from svdecode.common import distributed
from svdecode.evaluation.run import evaluate
from svdecode.models.loading import load_adapter, load_model
assert distributed.rank_and_size()[1] == 2
base, adapter, folder = map(Path, sys.argv[1:])
model, tokenizer = load_model(str(base))
model = load_adapter(model, adapter)
for task, data in (("truthfulqa_mc", "t.csv"), ("arc_easy", "c.json")):
    mu = Calibration.from_pretrained(adapter)
    evaluate(task, folder / data, model, tokenizer, mu=mu, batch_size=2, max_new_tokens=4, 
             decodings=["top-p" if task == "arc_easy" else "greedy"], output=folder / f"two-{task}", progress=False)
"""


def test_two_processes_find_what_one_does(folders, tmp_path, tokenizer):
    base, adapter = folders
    write_truthful(tmp_path / "t.csv", 13)
    write_json(tmp_path / "c.json", commonsense_rows(7))
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), str(base), str(adapter), str(tmp_path)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    model = load_adapter(load_model(str(base))[0], adapter)
    mu = svdecode.Calibration.from_pretrained(adapter)
    for task, data, decoding in (("truthfulqa_mc", "t.csv", "greedy"), ("arc_easy", "c.json", "top-p")):
        one, two = tmp_path / f"one-{task}", tmp_path / f"two-{task}"
        settings = {"mu": mu, "batch_size": 2, "max_new_tokens": 4, "decodings": [decoding], "output": one}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the workers have: sums in the same order
        quiet(task, tmp_path / data, model, tokenizer, **settings)
        torch.set_num_threads(threads)
        assert not list(two.glob("records.rank*"))
        assert len((two / "records.jsonl").read_text().splitlines()) == 8
        assert (two / "records.jsonl").read_text() == (one / "records.jsonl").read_text()
        assert json.loads((two / "results.json").read_text())["tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "nonsense", "--data", "{csv}"], "task must be one of"),
        (["--task", "truthfulqa_mc", "--data", "missing.csv"], "missing.csv is not a file"),
        (["--task", "truthfulqa_mc", "--data", "{json}"], "no 'question'"),
        (["--task", "arc_easy", "--data", "{csv}"], "no 'instruction'"),
        (["--task", "arc_easy", "--data", "{broken}"], "line 1: not JSON"),
        (["--task", "arc_easy", "--data", "{empty}"], "is empty"),
        (["--task", "truthfulqa_mc", "--data", "{few}"], "no question left"),
        (["--task", "truthfulqa_mc", "--data", "nobody/no-such-dataset"], "no data set of this name can be loaded"),
        (["--task", "arc_easy"], "arc_easy is not a file, and no data set of this name can be loaded"),
        (["--task", "nll"], "--data is needed: nll has no data of its own"),
        (["--task", "truthfulqa_mc", "--data", "{csv}", "--limit", "0"], "limit must be a positive integer"),
        (["--task", "truthfulqa_mc", "--data", "{csv}", "--mu", "1"], "need --adapter"),
        (["--task", "truthfulqa_mc", "--data", "{csv}", "--adapter", "{bare}"], "svdecode.json is missing"),
        (["--task", "truthfulqa_mc", "--data", "{csv}", "--adapter", "{adapter}", "--penalty", "-inf"], "penalty must be fin"),
        (["--task", "truthfulqa_mc", "--data", "{csv}", "--adapter", "{adapter}", "--alpha", "0.3"], "calibrated with alpha"),
        (["--task", "truthfulqa_mc", "--data", "{csv}", "--adapter", "{adapter}", "--estimator", "best"], "estimators must"),
        (["--task", "truthfulqa_mc", "--data", "{csv}", "--decoding", "beam"], "decoding is for generated answers"),
        (["--task", "arc_easy", "--data", "{json}", "--decoding", "worst"], "decoding must be one of"),
        (["--task", "arc_easy", "--data", "{json}", "--score", "guess"], "score must be one of"),
        (["--task", "nll", "--data", "{csv}", "--score", "choices"], "score is for the commonsense tasks"),
        (["--task", "arc_easy", "--data", "{json}", "--few-shot", "{csv}"], "few_shot is for the TruthfulQA"),
        (["--task", "arc_easy", "--data", "{json}", "--judge-model", "x"], "a judge is for truthfulqa_gen"),
        (["--task", "arc_easy", "--data", "{json}", "--steps", "{adapter}"], "needs --calibration-data"),
        (["--task", "arc_easy", "--data", "{json}", "--steps", "{bare}", "--calibration-data", "{json}"], "no checkpoint"),
        (["--task", "truthfulqa_gen", "--data", "{csv}", "--judge-url", "http://x"], "needs judge-model"),
        (["--task", "truthfulqa_gen", "--data", "{csv}", "--judge-url", "ftp://x", "--judge-model", "m"], "must start with"),
        (["--task", "truthfulqa_gen", "--data", "{csv}", "--judge-url", "http://x", "--judge-model", "m",
          "--judge-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments, words, folders, tmp_path, monkeypatch, capsys):
    """In this process, through the same app as the command's: status 2 and the sentence are `main`'s (test_the_command)."""
    base, adapter = folders
    (tmp_path / "bare").mkdir()
    (tmp_path / "broken.json").write_text("{")
    places = {
        "csv": write_truthful(tmp_path / "t.csv", 9), "json": write_json(tmp_path / "c.json", commonsense_rows(6)),
        "few": write_truthful(tmp_path / "few.csv", 5), "empty": write_json(tmp_path / "empty.json", []),
        "broken": tmp_path / "broken.json", "bare": tmp_path / "bare", "adapter": adapter,
    }  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(tmp_path.rglob("*"))
    filled = [*(a.format(**places) for a in arguments), "--model", str(base), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        here(*filled)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def test_status_2_and_one_line():
    failed = command("--task", "arc_easy", "--data", "missing.json")
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines() == ["svdecode: missing.json is not a file"]
    assert failed.stdout == ""
