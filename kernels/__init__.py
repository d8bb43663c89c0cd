"""Triton kernels of the operators, installed as `svdecode.kernels`: one file an operator, called by `torch.ops.svdecode`.

Read `settings.py` (how a row is cut), `row_algebra.py` (the arithmetic) and `row_statistics.py` (the first pass) first.
"""

from svdecode.kernels.fused_steer import fused_steer

__all__ = ["fused_steer"]
