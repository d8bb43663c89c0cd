"""Tests of the vLLM plugin, in an environment of their own (`make test-serving`); the main suite leaves this folder out.

Importing vLLM takes longer than most tests, and an engine cannot be taken down cleanly in its process: vLLM is imported once,
and each test marked `engine` runs in a fork.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import zlib
from pathlib import Path

CACHE = Path(tempfile.gettempdir()) / f"svdecode-serving-{os.getuid()}"
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
    "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(name, value)

import pytest
import torch
import torch._dynamo
import transformers
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401  (every fork shares what is imported here)
from _pytest.runner import runtestprotocol
from vllm.model_executor.models import registry

import svdecode.serving.model  # noqa: F401

# vLLM looks at a class in a process of its own, so as not to touch CUDA; here it may look in this one.
registry._run_in_subprocess = lambda look: look()


def pytest_configure(config):
    config.addinivalue_line("markers", "engine: starts an engine of vLLM, in a fork of this process")
    config.addinivalue_line("markers", "compiled: with torch.compile")


def pytest_runtest_protocol(item, nextitem):
    """Run a test that starts an engine in a fork, and report what came of it here."""
    if item.get_closest_marker("engine") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _in_a_fork(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.session._setupstate.teardown_exact(nextitem)  # what the tests before have left for this one
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _in_a_fork(item):
    hook = item.config.hook
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                reports = runtestprotocol(item, log=False, nextitem=None)
                values = [hook.pytest_report_to_serializable(config=item.config, report=report) for report in reports]
                pickle.dump(values, file)
                file.flush()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        try:
            values = pickle.load(file)
        except EOFError:
            pytest.exit(f"{item.nodeid}: its process ended with status {status} and said nothing", returncode=1)
    return [hook.pytest_report_from_serializable(config=item.config, data=value) for value in values]


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(0)
    # vLLM compiles functions of its sampler, which takes seconds and is not what these tests look at.
    torch._dynamo.config.disable = request.node.get_closest_marker("compiled") is None


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder in which tiny models lie; a fork leaves its own there for the next."""
    made_by = zlib.crc32(Path(__file__).with_name("kit.py").read_bytes())
    folder = CACHE / f"models-{transformers.__version__}-{made_by:x}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
