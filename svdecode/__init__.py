"""svdecode: Steering Vector Decoding (arXiv 2509.15888) as fused kernels and a drop-in decoding loop.

The operators (`fused_steer`, `steering_vector`, `optimal_strength`, `steered_nll`, `steer_sample`, `steer_topk`) need torch
alone. What works on models (`steer`, `generate`, `calibrate`, `Calibration`) is imported on first use, with transformers
and peft.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from svdecode.backends import backends
from svdecode.ops import (
    SteerOutput,
    fused_steer,
    optimal_strength,
    steer_sample,
    steer_topk,
    steered_nll,
    steering_vector,
)

if TYPE_CHECKING:
    from svdecode.calibration import Calibration, calibrate
    from svdecode.decoding import generate
    from svdecode.steering import steer

__version__ = "0.1.0"

_NEEDS_MODELS = {
    "steer": "svdecode.steering",
    "generate": "svdecode.decoding",
    "calibrate": "svdecode.calibration",
    "Calibration": "svdecode.calibration",
}

__all__ = [
    "Calibration",
    "SteerOutput",
    "backends",
    "calibrate",
    "fused_steer",
    "generate",
    "optimal_strength",
    "steer",
    "steer_sample",
    "steer_topk",
    "steered_nll",
    "steering_vector",
]


def __getattr__(name: str) -> object:
    if name not in _NEEDS_MODELS:
        raise AttributeError(f"module 'svdecode' has no attribute {name!r}")
    for package in ("transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"svdecode.{name} needs {package}: pip install 'svdecode[models]'")
    return getattr(importlib.import_module(_NEEDS_MODELS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
