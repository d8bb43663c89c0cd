"""Triton kernels of the operators, installed as `svdecode.kernels`: one file per operator, called by `torch.ops.svdecode`.

Read `settings.py` (how a row is cut), `row_algebra.py` (the arithmetic) and `row_statistics.py` (the first pass) first.

An operator's file, and with it triton, is imported when the operator is first asked for. In the root of a clone this folder is
also found as the top-level module `kernels`, which transformers imports to learn its version: that must need nothing.
"""

import importlib

_FILES = {
    "fused_steer": "fused_steer",
    "fused_steer_backward": "backward",
    "optimal_strength": "fused_steer",
    "steer_sample": "steer_sample",
    "steer_topk": "steer_topk",
    "steered_nll": "steered_nll",
    "steered_nll_backward": "backward",
    "steering_vector": "steering_vector",
    "steering_vector_backward": "backward",
}


def operator(name: str):
    """The function that computes an operator with Triton; its arguments are those of `svdecode.ops.reference`."""
    return getattr(importlib.import_module(f"svdecode.kernels.{_FILES[name]}"), name)
