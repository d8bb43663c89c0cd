"""What calibration keeps of each gold token and of each sequence, in memory that knows neither vocabulary nor kept set.

Memory: `TOKEN_BYTES` = 29 bytes per gold token, and the curve, 24 bytes per sequence and strength at which it is known.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from svdecode.strength.nll_curve import NLLCurve

TOKEN_BYTES = 29


@dataclass
class GoldTokens:
    """N gold tokens, one after the other."""

    moments: Tensor  # (N, 3) float32: N, D, H
    mu_star: Tensor  # (N,) float32
    kl: Tensor  # (N,) float32, nats
    num_kept: Tensor  # (N,) int32
    kept: Tensor  # (N,) bool: whether the gold token is in the kept set
    sequence: Tensor  # (N,) int32: index in the data of the example that the token belongs to

    @classmethod
    def concatenate(cls, parts: list[GoldTokens]) -> GoldTokens:
        """Join those of several batches."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __len__(self) -> int:
        """Number of gold tokens."""
        return len(self.kl)

    def select(self, tokens: Tensor) -> GoldTokens:
        """The given tokens, (N,) bool or (M,) int64 indices, in that order."""
        return GoldTokens(*(getattr(self, field.name)[tokens] for field in fields(self)))

    @property
    def bytes(self) -> int:
        """TOKEN_BYTES for each token."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


@dataclass
class TokenStatistics:
    """All that strengths, intervals and gains are computed from: under one direction, threshold and penalty."""

    gold: GoldTokens
    """Ordered by sequence."""
    curve: NLLCurve
    """Row s belongs to the s-th of the sequences that have a gold token."""

    def __len__(self) -> int:
        """Number of gold tokens."""
        return len(self.gold)

    def sequence_index(self) -> Tensor:
        """(N,) int64: each token's row in the curve."""
        return self.gold.sequence.unique(return_inverse=True)[1]

    def select(self, sequences: Tensor) -> TokenStatistics:
        """The given sequences, (S,) bool."""
        return TokenStatistics(self.gold.select(sequences[self.sequence_index()]), self.curve.select(sequences))

    @property
    def coverage(self) -> float:
        """Share of gold tokens inside the kept set."""
        return self.gold.kept.double().mean().item()

    @property
    def bytes(self) -> int:
        """What these statistics take."""
        return self.gold.bytes + self.curve.bytes
