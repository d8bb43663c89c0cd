"""svdecode: Steering Vector Decoding (arXiv 2509.15888) as fused kernels and a drop-in decoding loop.

Every public name is imported on first use, so that the command line starts without torch. The operators (`fused_steer`,
`steering_vector`, `optimal_strength`, `steered_nll`, `steer_sample`, `steer_topk`) need torch alone. What works on models
(`steer`, `generate`, `calibrate`, `Calibration`, `explain`) needs transformers and peft too.

The first operator that is named registers all of them under `torch.ops.svdecode`; `import svdecode.ops` does the same.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from svdecode.constants import VERSION as __version__

if TYPE_CHECKING:
    from svdecode.calibration.calibrate import calibrate
    from svdecode.decoding.generate import generate
    from svdecode.explanation.explanation import Explanation, explain
    from svdecode.models.steer import steer
    from svdecode.ops.backends import backends, use_backend
    from svdecode.ops.fused_steer import SteerOutput, fused_steer
    from svdecode.ops.optimal_strength import optimal_strength
    from svdecode.ops.setting import Setting
    from svdecode.ops.steer_sample import steer_sample
    from svdecode.ops.steer_topk import steer_topk
    from svdecode.ops.steered_nll import steered_nll
    from svdecode.ops.steering_vector import steering_vector
    from svdecode.strength.calibration import Calibration
    from svdecode.strength.figure import plot_calibration


__all__ = [
    "Calibration",
    "Explanation",
    "Setting",
    "SteerOutput",
    "__version__",
    "backends",
    "calibrate",
    "explain",
    "fused_steer",
    "generate",
    "optimal_strength",
    "plot_calibration",
    "steer",
    "steer_sample",
    "steer_topk",
    "steered_nll",
    "steering_vector",
    "use_backend",
]

_HOME = {
    "Setting": "ops.setting",
    "SteerOutput": "ops.fused_steer",
    "backends": "ops.backends",
    "fused_steer": "ops.fused_steer",
    "optimal_strength": "ops.optimal_strength",
    "steer_sample": "ops.steer_sample",
    "steer_topk": "ops.steer_topk",
    "steered_nll": "ops.steered_nll",
    "steering_vector": "ops.steering_vector",
    "use_backend": "ops.backends",
    # These need the extra `models`.
    "Calibration": "strength.calibration",
    "Explanation": "explanation.explanation",
    "calibrate": "calibration.calibrate",
    "explain": "explanation.explanation",
    "generate": "decoding.generate",
    "plot_calibration": "strength.figure",
    "steer": "models.steer",
}
_NEEDS_MODELS = ("Calibration", "Explanation", "calibrate", "explain", "generate", "plot_calibration", "steer")

# In a clone the kernels lie beside this folder and not in it: `svdecode.kernels` is found there too.
if (_root := Path(__file__).parent.parent).joinpath("kernels", "row_algebra.py").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'svdecode' has no attribute {name!r}")
    if name in _NEEDS_MODELS:
        for package in ("transformers", "peft"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"svdecode.{name} needs {package}: pip install 'svdecode[models]'")
    found = globals()[name] = getattr(importlib.import_module(f"svdecode.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
