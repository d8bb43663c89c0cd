"""Fast, by count: what the machine code of the kernels may cost per token, and what the model makes of it. No GPU needed.

The limits are in the tables below, in one place. `bench/counts.py` reads the numbers off the code for sm_90 and bfloat16;
`bench/kernel_work.py` says what each kernel has to do. Times are a model, not a measurement.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

STREAM = {"spilled": 0, "before_first_load": 60, "loads_before_first_wait": True}
CUDA_STREAM = {**STREAM, "before_first_load": 110}  # its pointers and strides come from structs
GATES: dict[str, dict[str, float | bool]] = {
    "row_statistics_kernel[with_kl=1": {"instructions": 30, "alu": 12, **STREAM},
    "row_statistics_kernel[with_kl=0": {"instructions": 25, "alu": 12, **STREAM},
    "row_statistics_kernel[align=1": {"instructions": 38, "spilled": 0},  # tokens one by one: V is no multiple of 8
    "CUDA steer_kernel": {"instructions": 40, **CUDA_STREAM},
    "CUDA sample_kernel": {"instructions": 40, **CUDA_STREAM},
    "CUDA topk_kernel": {"instructions": 40, **CUDA_STREAM},
}
"""How the name of a variant begins (`KERNEL_VARIANTS`, as `bench/compile_report.py` prints it): the most that it may have.

Instructions are per token of a peaked row. That a kernel loads by 16 bytes needs no limit: no narrower way counts."""

BACKWARD_VARIANTS = ["tile_maxima_kernel", "logits_gradient_kernel[drop=1"]
BACKWARD_LIMIT = 45
"""Instructions per token of a peaked row over all passes."""

LEAST_SHARES = {
    **{("dense with KL", 512): 0.92, ("dense with KL", 8192): 0.94},
    **{("greedy", 512): 0.9, ("greedy", 8192): 0.94},
}
"""Operator and rows of V = 128,256: the least share of an H100's copy bandwidth in the model. The target is 0.9."""
AFTER_FIRST_US = {"dense with KL": 2.0, "greedy": 1.8}
"""Microseconds of all launches after the first, per 512 rows of a large batch. The target is 2."""
ONE_ROW_US = {"dense with KL, CUDA": 10.0}
"""Microseconds of one row of V = 151,936 under graph replay."""


def counted(*command: str) -> dict:
    """What a script prints or writes as JSON, run without the interpreter's variable."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def rows_of(found: dict, name: str) -> list[dict]:
    """The counted variants whose names begin so; at least one, or the gate would hold nothing."""
    rows = [row for row in found["kernels"] if row["kernel"].startswith(name)]
    assert rows, f"no kernel {name!r} among {[row['kernel'] for row in found['kernels']]}"
    return rows


def misses(row: dict, limits: dict[str, float | bool]) -> dict[str, object]:
    """The limits that a counted variant misses, with what it has."""
    return {
        name: row[name]
        for name, limit in limits.items()
        if (not row[name] if limit is True else row[name] is None or row[name] > limit)
    }


def model_misses(found: dict, operator: str) -> dict[str, float]:
    """What an operator on an H100 has of the three limits of the model where it misses them."""
    missed = {}
    for row in found["model"]:
        if row["operator"] != operator:
            continue
        if row["share"] < LEAST_SHARES.get((operator, row["rows"]), 0.0):
            missed[f"share at {row['rows']} rows"] = row["share"]
        if row["rows"] == 8192 and operator in AFTER_FIRST_US:
            after = row["after_first_us"] * 512 / row["rows"]
            missed |= {"after the first": after} if after > AFTER_FIRST_US[operator] else {}
        if row["rows"] == 1 and row["us"] > ONE_ROW_US.get(operator, float("inf")):
            missed["one row"] = row["us"]
    return missed


@pytest.fixture(scope="module")
def found():
    names = [*GATES, *BACKWARD_VARIANTS]
    operators = ["dense with KL", "greedy", *([] if shutil.which("nvcc") is None else ONE_ROW_US)]
    options = ["--cards", "H100", "--only", *names, "--operators", *operators, "--json", "/dev/stdout", "--quiet"]
    return counted(str(ROOT / "bench" / "counts.py"), *options)


@pytest.fixture(scope="module")
def planted():
    return counted(str(ROOT / "tests" / "planted_kernels.py"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[NVCC] if name.startswith("CUDA") else []) for name in GATES]
)
def test_kernels_stay_within_their_counts(found, name):
    assert {row["kernel"]: misses(row, GATES[name]) for row in rows_of(found, name) if misses(row, GATES[name])} == {}


def test_the_backward_stays_within_its_count(found):
    for name in BACKWARD_VARIANTS:
        assert misses(rows_of(found, name)[0], {"spilled": 0}) == {}
    assert found["backward"] <= BACKWARD_LIMIT


@pytest.mark.parametrize("operator", sorted({operator for operator, _ in LEAST_SHARES}))
def test_the_model_gives_operators_the_bandwidth(found, operator):
    assert model_misses(found, operator) == {}


@NVCC
@pytest.mark.parametrize("operator", ONE_ROW_US)
def test_the_model_gives_one_row_little_time(found, operator):
    assert model_misses(found, operator) == {}


def test_the_model_gives_copies_the_copy_bandwidth(found):
    """Copy, add and softmax run at about that on real cards: a model that says otherwise says nothing of our kernels."""
    assert set(found["check"]["H100"]) >= {"copy", "add", "softmax, 4,096"}
    assert all(0.95 <= share <= 1.03 for share in found["check"]["H100"].values()), found["check"]


def test_a_copy_is_counted_as_its_machine_code_has_it(planted):
    (copy,) = rows_of(planted, "copy_kernel")
    assert (copy["loads"], copy["stores"]) == ({"16": 1}, {"16": 1})
    assert (copy["barriers"], copy["shuffles"], copy["spilled"]) == (0, 0, 0)
    assert copy["instructions"] < 4  # 19 of a thread, for its 8 tokens
    assert misses(copy, GATES["row_statistics_kernel[with_kl=1"]) == {}


def test_every_gate_is_seen_to_fail(planted, monkeypatch):
    limits = GATES["row_statistics_kernel[with_kl=1"]
    missed = {row["kernel"]: set(misses(row, limits)) for row in planted["kernels"]}
    assert missed["wasteful_kernel[]"] >= {"instructions", "alu"}
    assert missed["late_kernel[]"] >= {"before_first_load", "loads_before_first_wait"}
    assert missed["spilling_kernel[]"] >= {"spilled"}
    assert set().union(*missed.values()) == set(limits)
    assert "no way loads and stores" in planted["narrow"]
    assert planted["backward"] > BACKWARD_LIMIT
    for rows in (512, 8192):
        monkeypatch.setitem(LEAST_SHARES, ("planted", rows), 0.9)
    monkeypatch.setitem(AFTER_FIRST_US, "planted", 2.0)
    monkeypatch.setitem(ONE_ROW_US, "planted", 10.0)
    assert set(model_misses(planted, "planted")) == {
        "share at 512 rows",
        "share at 8192 rows",
        "after the first",
        "one row",
    }
    with pytest.raises(AssertionError, match="no kernel 'nothing'"):
        rows_of(planted, "nothing")
