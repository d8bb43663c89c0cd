"""Steered decoding inside vLLM: scheduling, paging, tensor parallelism and the OpenAI server are vLLM's own.

`engine_args` gives the arguments of `vllm.LLM`; `svdecode serve` starts a server. `registration.py` is where vLLM enters,
`model.py` is where to read first. The names below are imported on first use: vLLM loads `registration.py` in every process.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdecode.serving.engine import engine_args

__all__ = ["engine_args"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'svdecode.serving' has no attribute {name!r}")
    return getattr(importlib.import_module("svdecode.serving.engine"), name)
