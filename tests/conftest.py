"""Without a GPU the Triton kernels run in the interpreter; that must be decided before triton is imported."""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from cases import BACKENDS

try:  # bench/gpu.sh runs where hypothesis may be missing
    from hypothesis import settings
except ImportError:
    pass
else:
    settings.register_profile("svdecode", deadline=None, max_examples=20, derandomize=True)
    settings.load_profile("svdecode")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """Each backend that is here but the reference, chosen for all operators; float64 inputs still go to the reference."""
    monkeypatch.setattr(sys.modules["svdecode.backends"], "PREFERRED", request.param)
    return request.param
