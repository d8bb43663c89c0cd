"""What Python costs of a call with the Triton kernels, and that its remembered launches are Triton's own.

This file is also the script that measures, in a process of its own: in the others TRITON_INTERPRET is set before kernels are
decorated. Times are compared with a yardstick of the same minutes, since the machine may be busy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
ROWS, VOCABULARY = 3, 4100  # two splits
TIMED = ("fused_steer", "steer_sample, greedy")


def main() -> None:
    """Print what the tests below check, as JSON."""
    sys.path.insert(0, str(BENCH))
    import overhead

    def what_started(driver, call) -> list:
        driver.launches = []
        call()
        found = [
            (
                launch.metadata.hash,
                launch.grid,
                [(str(x.dtype), *x.shape) if isinstance(x, torch.Tensor) else x for x in launch.arguments],
            )
            for launch in driver.launches
        ]
        driver.launches = None
        return found

    torch.set_num_threads(1)
    with overhead.without_gpu() as driver, torch.no_grad():
        operators = overhead.operators(ROWS, VOCABULARY, "cpu")
        started = {}
        for name, call in operators.items():
            with overhead.launches_by_triton():
                expected = what_started(driver, call)
            call()
            started[name] = {"triton": repr(expected), "remembered": repr(what_started(driver, call))}
        timed = {overhead.YARDSTICK: overhead.calls(ROWS, VOCABULARY, "cpu")[overhead.YARDSTICK]}
        for name in TIMED:
            timed[name] = operators[name]
            timed[f"{name}, triton"] = overhead.through_triton(operators[name])
        times = overhead.measure(timed, turns=100)
    print(json.dumps({"started": started, "us": {name: min(us) for name, us in times.items()}}))


@pytest.fixture(scope="module")
def found() -> dict:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_remembered_launches_of_every_operator_are_those_of_triton(found):
    assert len(found["started"]) == 8
    for name, started in found["started"].items():
        assert started["remembered"] == started["triton"] != "[]", name


@pytest.mark.parametrize(("operator", "limit"), zip(TIMED, (45, 45), strict=True))
def test_a_call_costs_less_than_a_number_of_small_tensors(found, operator, limit):
    """23 to 33 of them on a busy machine; 75 to 92 where Triton prepares each launch."""
    assert found["us"][operator] < limit * found["us"]["torch.empty"]


@pytest.mark.parametrize("operator", TIMED)
def test_a_call_costs_half_of_what_it_costs_with_tritons_own_launches(found, operator):
    """A third is measured."""
    assert found["us"][operator] < 0.5 * found["us"][f"{operator}, triton"]


if __name__ == "__main__":
    main()
