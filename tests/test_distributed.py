"""Calibration over two processes on a CPU (gloo): the same result as one process, and no result where one dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import PAD, tiny_lora

import svdecode
from svdecode.common.distributed import rank_and_size

TIMEOUT = 120
SETTINGS = ({"alpha": 0.0, "direction": "log_ratio"}, {"alpha": 0.1, "penalty": -1.0}, {"alpha": 0.0, "penalty": 0.0})
LENGTHS = (9, 4, 12, 7, 10, 5, 8)  # an odd number of batches: the shares differ


def batches(die_at: int | None = None):
    """A stream without length, of batches that differ in size and label; a process may end in the middle of it."""
    generator = torch.Generator().manual_seed(4)
    for index, length in enumerate(LENGTHS):
        if index == die_at:
            os._exit(9)
        ids = torch.randint(3, 97, (1 + index % 3, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        if index == 3:
            labels[:] = -100  # a share may have nothing to add
        yield {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def worker(output: Path, mode: str) -> None:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    assert rank_and_size() == (rank, size)  # or each would have calibrated alone, which looks right
    if rank == 0:
        output.with_suffix(".started").touch()
    die_at = 5 if mode == "die" and rank == 1 else None
    cal = svdecode.calibrate(tiny_lora(), batches(die_at), alpha=0.05, progress=False)
    others = [
        svdecode.calibrate(tiny_lora(), batches(), **setting, compare=False, progress=False).estimates["exact"]
        for setting in SETTINGS
    ]
    torch.save({"tokens": {**vars(cal.tokens.gold), **vars(cal.tokens.curve)}}, output.with_suffix(f".{rank}.pt"))
    output.with_suffix(f".{rank}.json").write_text(json.dumps({**cal.to_dict(), "others": others}))


def start(rank: int, size: int, port: int, *arguments: object) -> subprocess.Popen:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in group.items()}, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(size: int, *arguments: object) -> list[tuple[int, str]]:
    """(exit status, stderr) of each of `size` processes."""
    port = free_port()
    processes = [start(rank, size, port, *arguments) for rank in range(size)]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[dict, dict]:
    output = tmp_path_factory.mktemp("alone") / "run"
    [(status, error)] = run(1, output, "whole")
    assert status == 0, error
    return json.loads(output.with_suffix(".0.json").read_text()), torch.load(output.with_suffix(".0.pt"))["tokens"]


def test_two_processes_find_what_one_does(alone, tmp_path):
    expected, tokens = alone
    for status, error in run(2, tmp_path / "run", "whole"):
        assert status == 0, error
    assert expected["num_tokens"] == sum((1 + i % 3) * (n - n // 2) for i, n in enumerate(LENGTHS) if i != 3)
    for rank in range(2):  # both have the whole
        found = json.loads((tmp_path / f"run.{rank}.json").read_text())
        for name in ("num_tokens", "num_sequences", "coverage", "kept", "data", "adapter"):
            assert found[name] == expected[name], name
        for name, value in expected["estimates"].items():
            assert found["estimates"][name] == pytest.approx(value, rel=1e-5), name
            assert found["intervals"][name] == pytest.approx(expected["intervals"][name], rel=1e-5, abs=1e-6), name
        assert found["others"] == pytest.approx(expected["others"], abs=1e-4)
        for row, other in zip(found["table"], expected["table"], strict=True):
            assert (row["name"], row["num_tokens"]) == (other["name"], other["num_tokens"])
            assert (row["mu"], row["gain"]) == pytest.approx((other["mu"], other["gain"]), rel=1e-4, abs=1e-6)
        assert found["recommendation"]["use"] == expected["recommendation"]["use"]
        assert found["mean_kl"] == pytest.approx(expected["mean_kl"], rel=1e-6)
        for which, numbers in expected["gains"].items():
            assert found["gains"][which]["gain"] == pytest.approx(numbers["gain"], rel=1e-5, abs=1e-7)
        gathered = torch.load(tmp_path / f"run.{rank}.pt")["tokens"]
        for name in ("num_kept", "kept", "sequence", "scored", "gold"):
            assert torch.equal(gathered[name], tokens[name]), name
        for name in ("moments", "kl", "sums", "ends"):
            a, b = gathered[name].double(), tokens[name].double()
            assert ((a.sum(0) - b.sum(0)).abs() <= 1e-6 * b.abs().sum(0)).all(), name
            # Token for token, up to what a matrix product's last bits make of the logits from run to run.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_dead_process_is_an_error_and_not_a_wrong_mean(tmp_path):
    (status, error), (dead, _) = run(2, tmp_path / "run", "die")
    assert dead == 9
    assert (tmp_path / "run.started").exists()
    assert status not in (0, 9)
    assert "a process of this run is gone" in error
    assert not list(tmp_path.glob("*.json"))
    assert not list(tmp_path.glob("*.pt"))


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
