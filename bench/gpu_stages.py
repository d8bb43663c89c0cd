"""The stages of `bench/gpu.sh`: what each runs, in which order, and how it is tried without a GPU.

Figures come before tests: whoever has a GPU for half an hour goes home with them. Nothing else runs on the machine while
something is timed; tests run side by side, since most of their time goes into compiling.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from step_runner import Step

PASSED = r"\d+ passed"
OPERATOR_TESTS = (
    "fused_steer", "steer_sample", "optimal_strength", "steered_nll", "steering_vector", "steer_topk", "backward", "properties",
    "compiled",
)  # fmt: skip
"""Files of tests/, each with both backends on a GPU."""
MODEL_TESTS = ("generate", "lazy", "recipes")
TINY_TESTS = {"fused_steer": "edges and plain", "steering_vector": "edges and plain"}
"""What a dry run runs: file, and the tests in it."""
SANITIZED = "edges and plain or strided"
TEST_PROCESSES = 3
TEST_FILES_AT_ONCE = 4
TINY_SHAPE = [
    "--rows",
    "1",
    "--vocabularies",
    "300",
    "--rivals",
    "eager",
    "--copy-bytes",
    "1000000",
    "--rounds",
    "1",
    "--pairs",
    "2",
]


class Stage(NamedTuple):
    """Steps that belong together."""

    name: str
    about: str
    steps: Sequence[Step]
    width: int = 1
    """How many steps run side by side."""

    @property
    def minutes(self) -> float:
        """Expected."""
        return sum(step.minutes for step in self.steps) / self.width


def stages(output: Path, dry_run: bool) -> list[Stage]:
    """All stages in their order.

    Args:
        output: the folder of the results.
        dry_run: the same scripts on the CPU, at tiny sizes.
    """
    site = output / "site"

    def without_site() -> str | None:
        return None if (site / "svdecode").is_dir() else "the stage install has not succeeded"

    def script(
        name: str, minutes: float, *options: str, result: str, step: str | None = None, limit: float = 450.0
    ) -> Step:
        """A script of bench/ that writes one file."""
        command = [sys.executable, f"bench/{name}.py", *options, "--output", str(output / result)]
        return Step(step or name, command, minutes, limit, without_site, results=(result,))

    def pytest(name: str, minutes: float, *options: str, limit: float = 450.0, before: Sequence[str] = ()) -> Step:
        """A file of tests/, from that folder: what is tested is the installed package and not the checkout."""
        command = [*before, sys.executable, "-m", "pytest", "-rs", f"test_{name}.py", *options]
        return Step(f"test_{name}", command, minutes, limit, without_site, PASSED, "tests")

    return [
        Stage("install", "this checkout, with the CUDA kernels where nvcc is there", [install(output, site, dry_run)]),
        Stage("environment", "card, driver, clocks, versions", [
            script("environment", 0.2, "--installed", str(output / "install.json"), result="environment.json"),
        ]),
        Stage("compile", "all kernels, in parallel; registers and spills", [
            script("compile_kernels", 2, "--budget", "{seconds}", *(["--most", "1", "--processes", "1"] if dry_run else []),
                   result="compile.json", step="compile"),
        ]),
        Stage("operators", "operators, rivals and bandwidths, the shapes of the targets first", [
            script("operators", 7, "--resume", "--budget", "{seconds}",
                   *([*TINY_SHAPE, "--outputs", "dense", "greedy"] if dry_run else []), result="operators.json"),
        ]),
        Stage("replay", "the same under graph replay, few rows", [
            script("operators", 5, "--replay", "--resume", "--budget", "{seconds}",
                   *([*TINY_SHAPE, "--outputs", "dense"] if dry_run else ["--outputs", "dense", "greedy", "scalars"]),
                   result="replay.json", step="replay"),
        ]),
        Stage("calls", "microseconds of Python per call", [
            script("python_calls", 0.5, *(["--burst", "2", "--rounds", "2"] if dry_run else []),
                   result="calls.json", step="calls"),
        ]),
        Stage("decoding", "tokens per second, against plain decoding", [
            decoding(script, adapter, dry_run) for adapter in (["lora"] if dry_run else ["lora", "pretrained"])
        ]),
        *([Stage("tests", "the tests of two operators", [
            pytest(name, 0.2, "-k", tests) for name, tests in TINY_TESTS.items()
        ])] if dry_run else test_stages(pytest)),
        Stage("report", "tables and figures of all that was measured", [
            Step("report", [sys.executable, "bench/report.py", str(output)], 0.2, needs=without_site, always=True),
        ]),
    ]  # fmt: skip


def install(output: Path, site: Path, dry_run: bool) -> Step:
    """Into the folder of the results; done again where that folder has gone to another machine without it."""
    command = [
        sys.executable,
        "bench/install.py",
        str(site),
        "--seconds",
        "{seconds}",
        "--output",
        str(output / "install.json"),
    ]
    command += ["--no-build"] if dry_run else []
    return Step("install", command, 3, results=("install.json",), always=not (site / "svdecode").is_dir())


def decoding(script, adapter: str, dry_run: bool) -> Step:
    """Tokens per second with one kind of adapter, or with a second model."""
    size = ["--batches", "1", "--prompt", "4", "--new", "2", "--rounds", "1", "--tiny"] if dry_run else ["--new", "64"]
    options = ["--adapter", adapter, "--dtype", "bfloat16", "--resume", "--budget", "{seconds}", *size]
    return script("decoding", 3, *options, result=f"decoding-{adapter}.json", step=f"decoding-{adapter}", limit=220.0)


def test_stages(pytest) -> list[Stage]:
    """The suite on the device, uninterpreted."""
    enough = (os.cpu_count() or 1) >= TEST_PROCESSES * TEST_FILES_AT_ONCE
    workers = ["-n", str(TEST_PROCESSES), "--dist", "worksteal"] if enough and importlib.util.find_spec("xdist") else []
    needed = {"properties": "hypothesis", **dict.fromkeys(MODEL_TESTS, "peft")}

    def needing(step: Step, package: str | None) -> Step:
        if package is None or importlib.util.find_spec(package):
            return step
        return step._replace(needs=lambda: f"the package {package} is not installed")

    def sanitizer() -> str | None:
        return None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on the PATH"

    checked = pytest("fused_steer", 4, "-k", SANITIZED, before=["compute-sanitizer", "--error-exitcode", "1"])._replace(
        name="sanitizer", needs=sanitizer
    )
    return [
        Stage("device", "tests of graphs, streams, a second card, large tensors", [pytest("gpu", 1)]),
        Stage("tests", "tests of all operators on both backends", [
            needing(pytest(name, 3, *workers), needed.get(name)) for name in OPERATOR_TESTS
        ], TEST_FILES_AT_ONCE),
        Stage("models", "tests of generate(), lazy and the recipes", [
            needing(pytest(name, 3, *workers), needed.get(name)) for name in MODEL_TESTS
        ], TEST_FILES_AT_ONCE),
        Stage("sanitizer", "compute-sanitizer on the main operator", [checked]),
    ]  # fmt: skip
