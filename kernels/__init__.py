"""Triton kernels of the operators, installed as `svdecode.kernels`: one file per operator, called by `torch.ops.svdecode`.

Read `settings.py` (how a row is cut), `row_algebra.py` (the arithmetic) and `row_statistics.py` (the first pass) first.
"""

from svdecode.kernels.backward import fused_steer_backward, steered_nll_backward, steering_vector_backward
from svdecode.kernels.fused_steer import fused_steer, optimal_strength
from svdecode.kernels.steer_sample import steer_sample
from svdecode.kernels.steer_topk import steer_topk
from svdecode.kernels.steered_nll import steered_nll
from svdecode.kernels.steering_vector import steering_vector

__all__ = [
    "fused_steer",
    "fused_steer_backward",
    "optimal_strength",
    "steer_sample",
    "steer_topk",
    "steered_nll",
    "steered_nll_backward",
    "steering_vector",
    "steering_vector_backward",
]
