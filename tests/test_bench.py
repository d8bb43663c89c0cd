"""The scripts in bench/, each on its smallest case, and what they share: turns, quartiles, logits."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from evaluation_kit import tiny_tokenizer, write_truthful
from tiny import tiny_llama, tiny_lora

import svdecode
from svdecode.common.timing import in_turns, microseconds, processor_name, quartiles

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import inputs

SMALL = ["--rows", "1", "--vocabularies", "1000"]
CPU = pytest.mark.skipif(not svdecode.backends()["cpu"], reason="the C++ operators are not here")


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs main() of a script in this process, which spares an import of torch each, and returns what it prints."""
    threads = torch.get_num_threads()

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    with torch.enable_grad():
        yield run
    torch.set_num_threads(threads)


def test_variants_take_turns_and_meet_different_arguments():
    seen = []
    calls = {name: lambda pair, name=name: seen.append((name, pair)) for name in ("a", "b")}
    times = in_turns(calls, [(0,), (1,), (2,)], warm_up=1, rounds=(3, 3))
    assert [name for name, _ in seen] == ["a", "b"] * 4
    assert [pair for _, pair in seen] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


def test_turns_end_with_their_time_but_not_before_the_least_rounds():
    count = len(in_turns({"a": lambda: None}, rounds=(5, 10**6), seconds=0.0)["a"])
    assert count == 5


def test_a_variant_that_fails_is_left_out_and_named():
    def fail():
        raise torch.OutOfMemoryError("too much")

    calls = {"fails": fail, "works": lambda: None}
    failed = {}
    times = in_turns(calls, rounds=(2, 2), failed=failed)
    assert failed == {"fails": "OutOfMemoryError"}
    assert len(times["fails"]) == 0
    assert len(times["works"]) == 2
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        in_turns(calls)


def test_medians_are_the_mean_of_the_middle_values():
    assert quartiles([1.0, 2.0, 3.0, 10.0])[1] == 2.5
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    found = microseconds({"a": [1e-6, 2e-6, 3e-6], "b": []})
    assert found["us"] == {"a": pytest.approx(2.0)}
    assert found["quartiles_us"]["a"] == pytest.approx([1.0, 3.0])


def test_the_processor_has_a_name():
    assert processor_name().strip()


def test_peaked_logits_keep_the_likely_tokens():
    pre, ft = inputs.peaked_logits(3, 1000, torch.bfloat16)
    assert pre.dtype == ft.dtype == torch.bfloat16
    assert not torch.equal(pre, ft)
    kept = svdecode.fused_steer(pre, ft, 0.5)
    assert kept.num_kept.tolist() == [inputs.LIKELY] * 3
    assert (kept.logprobs[0] > -torch.inf).nonzero().flatten().tolist() == [250, 750]
    assert inputs.gold_labels(3, 1000).tolist() == [250] * 3


def test_a_rotation_is_larger_than_the_caches():
    pairs = inputs.rotation(64, 8000, torch.float32)
    assert sum(x.nbytes for pair in pairs for x in pair) >= inputs.CACHE_BYTES["cpu"]
    assert len(inputs.rotation(1, 8, torch.float32)) == inputs.MOST_PAIRS["cpu"]


@CPU
def test_cpu_compares_both_ways(tmp_path, run_script):
    file = tmp_path / "cpu.json"
    printed = run_script("cpu", *SMALL, "--threads", 1, "--dtypes", "float32", "--rivals", "eager", "--seconds", 0.01,
                         "--output", file)  # fmt: skip
    dense, logprobs, greedy = json.loads(file.read_text())["results"]
    for row in (dense, logprobs):
        assert {"svdecode reused", "eager reused", "svdecode fresh", "eager fresh"} <= set(row["us"])
        assert all(low <= row["us"][name] <= high for name, (low, high) in row["quartiles_us"].items())
    assert set(greedy["us"]) == {"svdecode", "eager"}
    assert "into a buffer that is reused" in printed
    assert "fresh output" in printed


@CPU
def test_the_rivals_of_cpu_compute_what_svdecode_does():
    import cpu

    pre, ft = inputs.peaked_logits(4, 500)
    labels, out = inputs.gold_labels(4, 500), torch.empty(4, 500)
    ours = svdecode.fused_steer(pre, ft, cpu.MU, labels=labels, alpha=cpu.ALPHA)
    for found in (
        cpu.rival_all(pre, ft, labels),
        cpu.rival_all(pre, ft, labels, out),
        cpu.all_into(pre, ft, labels, out),
    ):
        logprobs, kl, *moments = found
        torch.testing.assert_close(logprobs, ours.logprobs)
        torch.testing.assert_close(kl, ours.kl, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.stack(moments, -1), ours.moments, atol=1e-4, rtol=1e-4)
    for found in (cpu.rival_logprobs(pre, ft, out), cpu.logprobs_into(pre, ft, out)):
        assert found.data_ptr() == out.data_ptr()
        torch.testing.assert_close(found, ours.logprobs)
    assert torch.equal(cpu.rival_greedy(pre, ft), ours.logprobs.argmax(-1))


def test_the_report_reads_what_operators_writes(tmp_path, run_script):
    file = tmp_path / "operators.json"
    small = [*SMALL, "--dtype", "float32", "--rivals", "eager", "--rounds", 1, "--pairs", 2, "--copy-bytes", 10**6]
    run_script("operators", *small, "--device", "cpu", "--output", file)
    report = json.loads(file.read_text())
    assert [row["output"] for row in report["results"]] == ["dense", "greedy", "scalars", "sampled", "topk", "nll"]
    assert all(set(row["us"]) >= set(row["ours"]) and not row["failed"] for row in report["results"])
    assert [row["output"] for row in report["results"] if "eager" in row["us"]] == ["dense", "greedy", "scalars"]
    printed = run_script("report", file, "--png", tmp_path / "roofline.png")
    assert printed.count("| 1 x 1000 |") == sum(len(row["ours"]) for row in report["results"])
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_traffic_prints_a_table(run_script):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the counter sits in the interpreter")
    printed = run_script("traffic", "--vocabulary", 1000)
    assert "fused_steer, penalty=-1" in printed
    assert printed.count("\n| peaked |") == printed.count("\n| flat |") == 10


def test_the_command_compares_reused_and_fresh_memory():
    from typer.testing import CliRunner

    from svdecode.cli.app import app

    arguments = ["bench", "--rows", "1", "--vocabulary", "1000", "--rounds", "1"]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert {"fused_steer, out=", "fused_steer"} <= {row["operator"] for row in found["results"]}
    assert all(row["seconds"] > 0 and row["eager_seconds"] > 0 for row in found["results"])


def asked_for_huge_pages(tensor):
    """For each mapping that holds a part of a tensor's memory."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    flags, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low < end and begin < high
        elif inside and first == "VmFlags:":
            flags.append("hg" in line.split())
    return flags


@CPU
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux")
def test_a_large_result_asks_for_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no huge pages")
    pre, ft = inputs.peaked_logits(1, 12_000_000)
    result = svdecode.fused_steer(pre, ft, 0.5)
    assert any(asked_for_huge_pages(result.logprobs))
    assert not any(asked_for_huge_pages(torch.empty(12_000_000)))


def tiny_pair(monkeypatch, script):
    """Let a script load a tiny model in the place of the bundled one."""
    monkeypatch.setattr(script, "load_model", lambda *_: (tiny_llama(), None))
    return script


@pytest.mark.parametrize("adapter", ["lora", "pretrained"])
def test_decoding_compares_with_plain_decoding(adapter, tmp_path, run_script, monkeypatch):
    tiny_pair(monkeypatch, importlib.import_module("decoding"))
    file = tmp_path / "decoding.json"
    small = ["--batches", "1", "--prompt", "4", "--new", "5", "--rounds", "2"]
    printed = run_script("decoding", "--adapter", adapter, *small, "--json", file)
    (result,) = json.loads(file.read_text())["results"]
    assert result["variants"]["plain, generate()"]["over_plain"] == 1.0
    assert ("two forwards" in result["variants"]) == (adapter == "lora")
    for row in result["variants"].values():
        low, high = row["quartiles_seconds"]
        assert 0 < low <= 5 / row["tokens_per_second"] <= high
    assert "| lazy, thin loop, sampling |" in printed


def test_calibration_times_the_forwards_and_the_rest(run_script, monkeypatch):
    script = tiny_pair(monkeypatch, importlib.import_module("calibration"))
    monkeypatch.setattr(script, "TOKENS", 200)
    small = ["--batches", "1", "--batch-size", "2", "--length", "12", "--prompt", "4"]
    found = json.loads(run_script("calibration", *small, "--json"))
    assert found["tokens_a_batch"] == 2 * (12 - 4)
    assert found["forward_ms_a_token"] > 0


@pytest.mark.parametrize("adapter", [None, "folder"])
def test_shared_prompt_has_a_command_line(adapter, tmp_path, run_script, monkeypatch):
    script = importlib.import_module("shared_prompt")
    file = write_truthful(tmp_path / "truthfulqa.csv")
    monkeypatch.setattr(script, "load_model", lambda name: (tiny_llama(), tiny_tokenizer()))
    monkeypatch.setattr(script, "load_adapter", lambda model, folder: tiny_lora())
    options = [] if adapter is None else ["--adapter", adapter]
    found = json.loads(run_script("shared_prompt", "--data", file, "--limit", 2, *options, "--json"))
    assert found["questions"] == 2
    assert found["largest_difference"] < 1e-4
    assert "| factor |" in run_script("shared_prompt", "--data", file, "--limit", 2, *options)
