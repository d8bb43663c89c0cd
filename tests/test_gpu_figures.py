"""What bench/gpu.sh makes of a card: the scripts' GPU branches on a stub card, and the targets' verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stub_card import NAME, stub_card

import svdecode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import compile_kernels
import device_timing
import environment
import inputs
import operators
import python_calls
import report
import rivals
import targets


@pytest.fixture
def small_card(monkeypatch):
    """The scripts on a stub card: both backends are the reference, and what the targets ask for is small."""
    real = operators.our_calls
    for module in (operators, python_calls, compile_kernels):
        monkeypatch.setattr(module, "our_backends", lambda device: ["triton", "cuda"])
    for module in (operators, compile_kernels):
        monkeypatch.setattr(module, "our_calls", lambda backend, *rest: real("reference", *rest))
    steer, sample, topk = svdecode.fused_steer, svdecode.steer_sample, svdecode.steer_topk
    instead = {"backend": "reference"}
    stub = SimpleNamespace(
        fused_steer=lambda *a, **k: steer(*a, **{**k, **instead}),
        steer_sample=lambda *a, **k: sample(*a, **{**k, **instead}),
        steer_topk=lambda *a, **k: topk(*a, **{**k, **instead}),
    )
    monkeypatch.setattr(python_calls, "svdecode", stub)
    monkeypatch.setattr(rivals, "compiled", lambda function, device: function)
    monkeypatch.setitem(operators.SHAPES, "cuda", [(8, 96, "bfloat16"), (1, 128, "bfloat16")])
    monkeypatch.setitem(operators.ROUNDS, "cuda", 3)
    monkeypatch.setitem(inputs.CACHE_BYTES, "cuda", 1000)
    monkeypatch.setitem(inputs.MOST_PAIRS, "cuda", 5)
    monkeypatch.setitem(device_timing.COPY_BYTES, "cuda", 4000)
    monkeypatch.setattr(device_timing, "WARM_CLOCKS", 0.0)
    monkeypatch.setitem(python_calls.VOCABULARY, "cuda", 64)
    monkeypatch.setattr(targets, "BANDWIDTH_VOCABULARY", 96)
    monkeypatch.setattr(targets, "BANDWIDTH_ROWS", 8)
    monkeypatch.setattr(targets, "REPLAY_SHAPE", (1, 128))
    monkeypatch.setattr(torch, "set_grad_enabled", lambda mode: None)


def run_main(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    with torch.no_grad():
        return script.main()


def test_the_branches_for_a_gpu_run_on_a_stub_card(tmp_path, monkeypatch, small_card, capsys):
    softmax = SimpleNamespace(softmax=lambda x: x.softmax(-1))
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(softmax=softmax))
    monkeypatch.setitem(sys.modules, "quack.softmax", softmax)
    with stub_card() as asked:
        assert run_main(monkeypatch, operators, "--output", tmp_path / "operators.json") == 0
        assert asked["sleep"] > 50
        assert asked["capture"] == 0
        assert run_main(monkeypatch, operators, "--replay", "--output", tmp_path / "replay.json") == 0
        assert asked["capture"] > 0
        assert asked["replay"] == 5 * asked["capture"]  # two warm-up rounds and three timed ones
        calls = ["--burst", 2, "--rounds", 3, "--output", tmp_path / "calls.json"]
        assert run_main(monkeypatch, python_calls, *calls) == 0
        assert compile_kernels.warm(("triton", "dense", 2, 64, "bfloat16", "cuda"))["seconds"] > 0
        assert environment.environment()["card"]["l2_bytes"] > 0
    found = json.loads((tmp_path / "operators.json").read_text())
    assert found["card"] == NAME
    first = found["results"][0]
    assert set(first["us"]) == {"triton", "cuda", "eager", "compiled", "quack softmax"}
    assert first["minimum_bytes"] == {
        **dict.fromkeys(("triton", "cuda", "eager", "compiled"), 8 * 96 * (2 + 2 + 4)),
        "quack softmax": 8 * 96 * (2 + 2),
    }
    assert first["extra_bytes_per_row"] == 4096 / 8
    text = targets.text(tmp_path)
    assert "0 not measured" in text
    assert "Python per call" in text
    capsys.readouterr()
    assert run_main(monkeypatch, report, tmp_path) == 0
    assert "quack softmax" in capsys.readouterr().out


def test_a_variant_that_cannot_be_captured_costs_no_other_figure(tmp_path, monkeypatch, small_card):
    turns = iter([True, False] * 100)
    file = tmp_path / "replay.json"
    options = ["--replay", "--outputs", "dense", "--rivals", "--rows", 1, "--vocabularies", 128, "--output", file]
    with stub_card(capturable=lambda: next(turns)):
        assert run_main(monkeypatch, operators, *options) == 1
    (row,) = json.loads(file.read_text())["results"]
    assert set(row["us"]) == {"triton"}
    assert "capturing" in row["failed"]["cuda"]
    verdict = targets.replay_verdict(targets.load(tmp_path, "replay.json"))
    assert verdict.status == targets.NOT_MEASURED
    assert "capturing" in verdict.measured
    with stub_card():  # what failed is measured again
        assert run_main(monkeypatch, operators, *options, "--resume") == 0
    (row,) = json.loads(file.read_text())["results"]
    assert set(row["us"]) == {"triton", "cuda"}


def test_a_budget_that_ends_is_said_and_gone_on_with(tmp_path, monkeypatch, small_card):
    file = tmp_path / "operators.json"
    with stub_card():
        assert run_main(monkeypatch, operators, "--budget", -1, "--output", file) == operators.UNFINISHED
        assert len(json.loads(file.read_text())["skipped"]) == 2 * len(operators.OUTPUTS)
        assert run_main(monkeypatch, operators, "--outputs", "dense", "--output", file) == 0
        kept = json.loads(file.read_text())["results"]
        assert run_main(monkeypatch, operators, "--outputs", "dense", "greedy", "--resume", "--output", file) == 0
    found = json.loads(file.read_text())["results"]
    assert found[: len(kept)] == kept
    assert [row["output"] for row in found] == ["dense", "dense", "greedy", "greedy"]


def result(output, shape, us, replay=False, **rest):
    rows, vocabulary = shape
    return {
        "output": output,
        "rows": rows,
        "vocabulary": vocabulary,
        "dtype": "bfloat16",
        "replay": replay,
        "pairs": 200,
        "ours": ["triton", "cuda"],
        "bound_us": 90.0,
        "us": us,
        "quartiles_us": {name: [0.9 * value, 1.1 * value] for name, value in us.items()},
        "failed": {},
        **rest,
    }


def write_results(folder, dense, greedy, replayed, calls):
    common = {"device": "cuda", "torch.compile": "max-autotune-no-cudagraphs", "skipped": []}
    rows = [result("dense", (512, 128256), dense), result("greedy", (512, 128256), greedy)]
    replay = [result("dense", (1, 151936), replayed, replay=True)]
    (folder / "operators.json").write_text(json.dumps({**common, "results": rows}))
    (folder / "replay.json").write_text(json.dumps({**common, "results": replay}))
    quartiles = {name: [us, us] for name, us in calls.items()}
    (folder / "calls.json").write_text(json.dumps({**common, "us": calls, "quartiles_us": quartiles, "failed": {}}))


def test_targets_are_met_missed_or_not_measured(tmp_path):
    write_results(
        tmp_path,
        dense={"triton": 95.0, "cuda": 101.0, "eager": 900.0, "compiled": 400.0},
        greedy={"triton": 100.0, "eager": 500.0, "compiled": 99.0},
        replayed={"triton": 9.0, "cuda": 10.5},
        calls={"triton: fused_steer": 45.0, "triton: steer_sample, greedy": 35.5},
    )
    lines = {verdict.target: verdict for verdict in targets.verdicts(tmp_path)}
    status = {target: verdict.status for target, verdict in lines.items()}
    share = "at least 90% of the copy bandwidth"
    assert status[f"dense, 512 x 128256, triton: {share}"] == targets.MET
    assert status[f"dense, 512 x 128256, cuda: {share}"] == targets.MISSED
    assert lines[f"dense, 512 x 128256, triton: {share}"].measured == "94.7% [86.1%, 105.3%], 95.0 us"
    assert status[f"greedy, 512 x 128256, triton: {share}"] == targets.MET
    assert status[f"greedy, 512 x 128256, cuda: {share}"] == targets.NOT_MEASURED
    assert status["dense, 1 x 151936, cuda, graph replay: at most 10 us"] == targets.MISSED
    assert status["fused_steer, triton: at most 45 us of Python per call"] == targets.MET
    assert status["steer_sample, greedy, triton: at most 35 us of Python per call"] == targets.MISSED
    mode = "torch.compile (max-autotune-no-cudagraphs)"
    assert status["triton, single calls: faster than eager PyTorch"] == targets.MET
    slower = lines[f"triton, single calls: faster than {mode}"]
    assert slower.status == targets.MISSED
    assert slower.measured.startswith("1 of 2 cases; least factor 0.99 [0.81, 1.21] at greedy, 512 x 128256")
    assert status[f"cuda, graph replay: faster than {mode}"] == targets.NOT_MEASURED


def test_figures_of_a_cpu_meet_no_target(tmp_path):
    write_results(tmp_path, {"triton": 1.0}, {"triton": 1.0}, {"cuda": 1.0}, {"triton: fused_steer": 1.0})
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace('"cuda", "torch.compile"', '"cpu", "torch.compile"'))
    assert {verdict.status for verdict in targets.verdicts(tmp_path)} == {targets.NOT_MEASURED}
