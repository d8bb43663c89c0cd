"""The compiler's own artefacts, on a machine without a GPU: no spills, few registers, 16-byte loads, for every target."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "compile_report.py"
TARGETS = {"sm_80", "sm_90", "sm_100", "sm_120"}
MAX_REGISTERS = 168  # three programs of 128 threads on a processor's 65,536
SPILLED = {("row_statistics_kernel[with_kl=1", "sm_80"): 32}
"""Bytes per thread, known: with more registers only two programs would fit on a processor of an A100."""
STREAMS = ("row_statistics_kernel", "logits_gradient_kernel")  # may have more for float32 logits (kernels/settings.py)
MERGE_ONLY = {"gradient_coefficients_kernel[]"}  # a row's numbers, no streaming

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(*options: str) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def rows():
    return compiled("--dtypes", "bf16/bf16", "fp32/fp32")


def test_rows_on_three_levels_compile():
    assert not [row for row in compiled("--levels", "--targets", "90", "--dtypes", "bf16/fp32") if row["spilled"]]


def test_every_kernel_compiles_for_every_target(rows):
    assert {row["target"] for row in rows} == TARGETS
    import svdecode.kernels

    written = {
        name.split("(")[0]
        for path in Path(svdecode.kernels.__file__).parent.glob("*.py")
        for name in path.read_text().split("\ndef ")[1:]
        if name.split("(")[0].endswith("_kernel")
    }
    assert written == {row["kernel"].split("[")[0] for row in rows}


def test_nothing_spills(rows):
    assert not [row for row in rows if row["spilled"] > SPILLED.get((row["kernel"].split(",")[0], row["target"]), 0)]
    assert not [row for row in rows if row["registers"] > MAX_REGISTERS and not row["kernel"].startswith(STREAMS)]
    assert not [row for row in rows if row["registers"] > MAX_REGISTERS and row["dtypes"] == "bf16/bf16"]


def test_streaming_loads_are_16_bytes_wide(rows):
    for row in rows:
        if row["kernel"].startswith("row_statistics_kernel"):
            assert set(row["loads"]) == {"16"}, row
        elif not (row["kernel"] in MERGE_ONLY or "dense=0" in row["kernel"]):
            assert row["loads"].get("16", 0) >= 2, row  # both inputs
