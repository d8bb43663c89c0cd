"""Defaults and names that several folders share, defined once."""

from __future__ import annotations

import math
from typing import Literal

VERSION = "0.1.0"
"""Of svdecode; pyproject.toml reads it from here."""

ALPHA = 0.1
"""Confidence threshold of the kept set (paper, Table 6 and appendix F.3)."""

PENALTY = -math.inf
"""lambda, added to tokens outside the kept set (paper, Table 6)."""

EPS = 1e-12
"""Guards the denominators of the optimal strength (paper, Eq. 41)."""

IGNORE_INDEX = -100
"""Label of positions that take no part, as in `torch.nn.functional.cross_entropy`."""

Direction = Literal["kl", "log_ratio"]
KL: Direction = "kl"
LOG_RATIO: Direction = "log_ratio"
DIRECTIONS = (KL, LOG_RATIO)
"""`kl`: delta = p * c, the paper's steering vector. `log_ratio`: delta = c, contrastive decoding and its kin."""

BackendName = Literal["reference", "cpu", "triton", "cuda"]
"""Who can compute an operator; `svdecode.backends()` says which of them are here."""

SAVED_FIELDS = 6
"""What a forward keeps of each row for its backward, float32; `kernels/fused_steer.py` says what."""
