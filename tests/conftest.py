"""Without a GPU the Triton kernels run in the interpreter and the CUDA kernels in their emulation on the host.

Both must be decided before svdecode is imported.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # idle OpenMP threads spin: two workers on two cores were 14 times slower
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    import emulation

    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "SVDECODE_CUDA_EMULATION" not in os.environ:  # workers of xdist inherit it
        os.environ["SVDECODE_CUDA_EMULATION"] = str(emulation.build() or "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from cases import BACKENDS, use_backend

try:  # bench/gpu.sh runs where hypothesis may be missing
    from hypothesis import settings
except ImportError:
    pass
else:
    settings.register_profile("svdecode", deadline=None, max_examples=20, derandomize=True)
    settings.load_profile("svdecode")


collect_ignore = ["serving"]  # `make test-serving` has an environment with vLLM for it


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Each backend that is here but the reference, chosen for all operators; float64 inputs still go to the reference."""
    with use_backend(request.param) as name:
        yield name
