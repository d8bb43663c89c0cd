"""`pytest -p ptx.plugin`: the tests of the Triton backend run on the kernels' PTX instead of Triton's interpreter.

    cd tests && ../.venv/bin/pytest -p ptx.plugin -k triton test_fused_steer.py

A race, a misaligned access and whatever else the interpreter refuses fails the test that did it. It takes a process of its own:
kernels that were decorated under TRITON_INTERPRET=1 cannot be compiled.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"
os.environ["SVDECODE_CUDA_EMULATION"] = ""  # other backends are not tested here
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default up to triton 3.9, which warns where it is not said

from dataclasses import asdict

import pytest
import torch

from ptx import triton_driver
from ptx.triton_driver import COSTS, Cost
from svdecode.ops import backends

TARGETS = (80, 90, 100, 120)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx", "run Triton kernels on their PTX")
    group.addoption("--ptx-target", type=int, default=90, choices=TARGETS, help="compile for this sm_ (90)")
    group.addoption("--ptx-perturb", action="store_true", help="add the errors that approximate instructions may have")
    group.addoption("--ptx-seed", type=int, default=0, help="seed of these errors and of the order of atomics (0)")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before `conftest.py` asks which backends are here."""
    torch.set_num_threads(1)
    options = early_config.known_args_namespace
    triton_driver.install(options.ptx_target, float(options.ptx_perturb), options.ptx_seed)
    backends.triton_is_interpreted = lambda: True  # they run on CPU tensors, as interpreted kernels do


def pytest_report_header(config: pytest.Config) -> str:
    perturbed = f", errors with seed {config.option.ptx_seed}" if config.option.ptx_perturb else ""
    return f"PTX: triton kernels compiled for sm_{config.option.ptx_target}{perturbed}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # in a worker of xdist
    if output is not None:
        output["ptx"] = {name: asdict(cost) for name, cost in COSTS.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    for name, cost in getattr(node, "workeroutput", {}).get("ptx", {}).items():
        total = COSTS.setdefault(name, Cost())
        total.launches += cost["launches"]
        total.thread_instructions += cost["thread_instructions"]
        total.seconds += cost["seconds"]


def pytest_terminal_summary(terminalreporter) -> None:
    if not COSTS:
        return
    terminalreporter.section("PTX")
    terminalreporter.line(f"{'kernel':40s} {'launches':>9s} {'million thread instructions':>28s} {'seconds':>8s}")
    total = Cost()
    for name, cost in sorted(COSTS.items()):
        terminalreporter.line(
            f"{name:40s} {cost.launches:9d} {cost.thread_instructions / 1e6:28.1f} {cost.seconds:8.1f}"
        )
        total.launches += cost.launches
        total.thread_instructions += cost.thread_instructions
        total.seconds += cost.seconds
    rate = total.thread_instructions / 1e6 / max(total.seconds, 1e-9)
    terminalreporter.line(f"{total.launches} launches, {rate:.0f} million thread instructions per second")
