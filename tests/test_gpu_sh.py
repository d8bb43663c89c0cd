"""bench/gpu.sh without a GPU: every stage at tiny sizes on the CPU, and what runs the stages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import environment
import gpu
import gpu_stages
import install
from step_runner import TIMED_OUT, UNFINISHED, Runner, Step

PLANTED = """
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    if item.path.name == "test_fused_steer.py":
        raise AssertionError("a planted failure")
"""


def run_gpu_sh(output, *arguments, **variables):
    command = ["bash", "bench/gpu.sh", "--dry-run", "--output", str(output), *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def measured_at(output):
    return {path.name: path.stat().st_mtime_ns for path in output.glob("*.json") if path.name != "state.json"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_failing_test_costs_no_figure_and_the_next_run_does_only_what_is_left(tmp_path):
    pytest.importorskip("triton")
    output, archive = tmp_path / "results", tmp_path / "results.tar.gz"
    (tmp_path / "planted.py").write_text(PLANTED)
    planted = {"PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": "-p planted"}
    first = run_gpu_sh(output, "--archive", str(archive), **planted)
    assert first.returncode == gpu.FAILED, first.stdout + first.stderr
    for name in ("operators.json", "replay.json"):
        (row, *_) = json.loads((output / name).read_text())["results"]
        assert row["failed"] == {}
        assert min(row["us"].values()) > 0
        assert {"eager", *row["ours"]} == set(row["us"])
    assert json.loads((output / "calls.json").read_text())["us"]
    assert json.loads((output / "compile.json").read_text())["variants"][0]["registers"] > 0
    (batch,) = json.loads((output / "decoding-lora.json").read_text())["results"]
    assert "paired, thin loop" in batch["variants"]
    assert json.loads((output / "environment.json").read_text())["svdecode_from"] == str(output / "site" / "svdecode")
    text = (output / "report.md").read_text()
    assert "| dense | 1 x 300 | bfloat16, replay |" in text
    assert (output / "bandwidth-operators.png").stat().st_size > 1000
    shown = first.stdout[first.stdout.index("== FAILED") :]
    assert "-- test_fused_steer: exit status 1, status 1; the end of " in shown
    assert "a planted failure" in shown
    assert "test_steering_vector" not in shown
    assert shown.splitlines()[-1].startswith("9 of 10 steps done, 1 failed.")
    with tarfile.open(archive) as file:
        names = file.getnames()
    assert "results/operators.json" in names
    assert "results/logs/test_fused_steer.log" in names
    assert not [name for name in names if "/site" in name]

    before = measured_at(output)
    second = run_gpu_sh(output)
    assert second.returncode == 0, second.stdout + second.stderr
    assert measured_at(output) == before
    assert second.stdout.count(": done before") == 7
    assert "test_fused_steer: done" in second.stdout
    assert "test_steering_vector: done" not in second.stdout
    assert "FAILED" not in second.stdout


def python(code, name="step", **options):
    return Step(name, [sys.executable, "-c", code], 0.1, **options)


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path / "out", tmp_path, dict(os.environ))


def outcome_of(runner, step, seconds=60.0):
    runner.run([step], time.monotonic() + seconds)
    return runner.outcomes[step.name]


def test_what_comes_of_a_step(runner):
    assert outcome_of(runner, python("print('3 passed')", prints=r"\d+ passed")).kind == "done"
    assert outcome_of(runner, python("print('4 skipped')", "none", prints=r"\d+ passed")).kind == "failed"
    assert outcome_of(runner, python(f"raise SystemExit({UNFINISHED})", "later")).kind == "unfinished"
    assert outcome_of(runner, python("print('why'); raise SystemExit(4)", "wrong")).status == 4
    assert runner.last_lines("wrong")[-1] == "why"
    assert outcome_of(runner, python("", "absent", needs=lambda: "no card")).reason == "no card"
    assert outcome_of(runner, Step("nothing", ["/no/such/program"], 0.1)).status == 127
    assert outcome_of(runner, python("", "late"), seconds=0.0).kind == "unfinished"
    again = Runner(runner.output, runner.root, {})
    assert again.outcomes == runner.outcomes


def test_a_step_that_hangs_ends_with_its_children_and_the_next_one_runs(runner, tmp_path, monkeypatch):
    file = tmp_path / "written"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(file)!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    hanging, after = python(parent, "hangs", limit=1.5), python("", "after")
    monkeypatch.setattr("step_runner.LEAST_SECONDS", 0.1)
    runner.run([hanging, after], time.monotonic() + 60)
    assert runner.outcomes["hangs"].status == TIMED_OUT
    assert runner.outcomes["after"].kind == "done"
    time.sleep(4)
    assert not file.exists()


def test_what_is_done_is_skipped_until_it_is_forgotten(runner):
    runner.output.mkdir(parents=True)
    step = python("import pathlib; open('out/count', 'a').write('x')", results=("figures.json",))
    always = step._replace(name="always", always=True)
    for _ in range(2):
        runner.run([step, always], time.monotonic() + 60)
    assert (runner.output / "count").read_text() == "xxx"
    (runner.output / "figures.json").write_text("{}")
    runner.forget(step)
    assert not (runner.output / "figures.json").exists()
    assert not runner.is_done(step)


def test_the_budget_reaches_the_script(runner):
    step = Step("budget", [sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"], 0.1, limit=100.0)
    outcome_of(runner, step, 1000.0)
    assert runner.last_lines("budget")[-1] == "85"


def test_every_stage_ends_in_8_minutes_and_figures_come_before_tests(tmp_path):
    found = gpu_stages.stages(tmp_path, dry_run=False)
    names = [stage.name for stage in found]
    assert gpu.STAGE_SECONDS < 8 * 60
    assert all(stage.minutes < 8 and all(step.limit < 8 * 60 for step in stage.steps) for stage in found)
    assert names.index("decoding") < names.index("device") < names.index("tests") < names.index("report")
    assert len({step.name for stage in found for step in stage.steps}) == sum(len(stage.steps) for stage in found)
    for stage in found:
        for step in stage.steps:
            for part in step.command:
                if part.endswith(".py"):
                    assert (ROOT / step.folder / part).is_file()


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as raised:
        gpu.card_name()
    assert raised.value.code == gpu.CANNOT_BEGIN
    assert "torch sees no GPU" in capsys.readouterr().err


def test_results_of_other_sources_are_not_mixed(tmp_path, monkeypatch, capsys):
    gpu.check_sources(tmp_path, renew=False)
    gpu.check_sources(tmp_path, renew=False)
    monkeypatch.setattr(gpu, "sources_digest", lambda: "another")
    with pytest.raises(SystemExit):
        gpu.check_sources(tmp_path, renew=False)
    assert "results of other sources" in capsys.readouterr().out
    gpu.check_sources(tmp_path, renew=True)
    gpu.check_sources(tmp_path, renew=False)


def test_a_build_that_fails_leaves_the_python_files(tmp_path, monkeypatch, capsys):
    tried = []

    def build(kind, target, seconds):
        tried.append(kind)
        target.mkdir()
        (target / "rest").touch()
        return "nvcc is broken"

    monkeypatch.setattr(install, "build", build)
    monkeypatch.setattr(install, "has_nvcc", lambda: True)
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path / "site"), "--output", str(tmp_path / "install.json")])
    assert install.main() == 1
    assert tried == ["cuda", "cpu"]
    found = json.loads((tmp_path / "install.json").read_text())
    assert found["built"] == "python"
    assert found["failed"] == {"cuda": "nvcc is broken", "cpu": "nvcc is broken"}
    assert (tmp_path / "site" / "svdecode" / "kernels" / "row_algebra.py").is_file()
    assert not (tmp_path / "site" / "rest").exists()
    assert "WITHOUT any compiled operators" in capsys.readouterr().out


def test_kernels_that_were_built_but_cannot_be_used_are_a_failure(tmp_path, monkeypatch, capsys):
    (tmp_path / "install.json").write_text('{"cuda_kernels": true}')
    missing = {"cuda": SimpleNamespace(_asdict=lambda: {"available": False, "reason": "no symbol"})}
    monkeypatch.setattr(environment.svdecode, "backends", lambda: missing)
    monkeypatch.setattr(sys, "argv", ["environment.py", "--installed", str(tmp_path / "install.json")])
    assert environment.main() == 1
    assert "no symbol" in capsys.readouterr().err
