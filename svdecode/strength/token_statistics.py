"""What calibration keeps of each gold token, and the NLL at any strength from it.

Memory: `FIXED_BYTES` = 44 bytes per gold token and `KEPT_BYTES` = 8 bytes for each token of its kept set, whatever the
vocabulary and the model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

FIXED_BYTES, KEPT_BYTES = 44, 8


@dataclass
class TokenStatistics:
    """What calibration keeps of N gold tokens, with T kept tokens in all of their kept sets together."""

    moments: Tensor  # (N, 3) float32: N, D, H
    mu_star: Tensor  # (N,) float32
    kl: Tensor  # (N,) float32, nats
    num_kept: Tensor  # (N,) int32
    logprobs: Tensor  # (T,) float32: log-probabilities within the kept set, token after token
    deltas: Tensor  # (T,) float32: the steering vector there
    gold: Tensor  # (N,) int64: index of the gold token in the (T,) tensors, -1 where it is not kept
    offsets: Tensor  # (N,) int64: index of each token's first kept token in the (T,) tensors
    sequence: Tensor  # (N,) int32: index in the data of the example that the token belongs to; -1 where that is unknown

    @classmethod
    def concatenate(cls, parts: list[TokenStatistics]) -> TokenStatistics:
        """Join the statistics of several batches."""
        shift, moved = 0, []
        for part in parts:
            gold = torch.where(part.gold >= 0, part.gold + shift, -1)
            moved.append((gold, part.offsets + shift))
            shift += len(part.logprobs)
        names = [field.name for field in fields(cls) if field.name not in ("gold", "offsets")]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, gold=torch.cat([g for g, _ in moved]), offsets=torch.cat([o for _, o in moved]))

    def __len__(self) -> int:
        """Number of gold tokens."""
        return len(self.kl)

    def counts(self) -> Tensor:
        """(N,) int64: how many of the (T,) tensors' entries belong to each token."""
        ends = torch.cat([self.offsets[1:], self.offsets.new_tensor([len(self.logprobs)])])
        return ends - self.offsets

    def select(self, tokens: Tensor) -> TokenStatistics:
        """The given tokens, (M,) int64 indices or (N,) bool, in that order; indices may repeat."""
        if tokens.dtype == torch.bool:
            tokens = tokens.nonzero().squeeze(-1)
        counts, first, gold = self.counts()[tokens], self.offsets[tokens], self.gold[tokens]
        offsets = counts.cumsum(0) - counts
        kept = torch.arange(int(counts.sum())) + torch.repeat_interleave(first - offsets, counts)
        names = ("moments", "mu_star", "kl", "num_kept", "sequence")
        return TokenStatistics(
            **{name: getattr(self, name)[tokens] for name in names},
            logprobs=self.logprobs[kept],
            deltas=self.deltas[kept],
            gold=torch.where(gold >= 0, gold - first + offsets, -1),
            offsets=offsets,
        )

    def at_most(self, kept: int) -> TokenStatistics:
        """Sequences, drawn at random (always the same), with at most so many kept tokens together; one at least, or all.

        A model that knows nothing keeps nearly its whole vocabulary: files and figures of it need a bound.
        """
        if len(self.logprobs) <= kept:
            return self
        names, index = self.sequence.unique(return_inverse=True)
        sizes = torch.zeros(len(names), dtype=torch.int64).index_add_(0, index, self.counts())
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
        fits = sizes[order].cumsum(0) <= kept
        fits[0] = True
        chosen = torch.zeros(len(names), dtype=torch.bool)
        chosen[order[fits]] = True
        return self.select(chosen[index])

    @property
    def covered(self) -> Tensor:
        """(N,) bool: gold tokens inside the kept set."""
        return self.gold >= 0

    @property
    def coverage(self) -> float:
        """Share of gold tokens inside the kept set."""
        return self.covered.double().mean().item()

    @property
    def bytes(self) -> int:
        """What these statistics take: FIXED_BYTES per gold token and KEPT_BYTES per kept token."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def derivatives(self, mu: float) -> tuple[float, float, float]:
        """Mean NLL over the covered gold tokens at strength mu, and its first two derivatives in mu (convex)."""
        return tuple(value.mean().item() for value in self.per_token(mu))

    def nll(self, mu: float) -> Tensor:
        """(covered tokens,) float64: NLL of each covered gold token at strength mu."""
        return self.per_token(mu)[0]

    def end_slopes(self) -> tuple[Tensor, Tensor]:
        """The limits of each covered gold token's slope in mu at -infinity (<= 0) and at +infinity (>= 0), each float64."""
        row = torch.repeat_interleave(torch.arange(len(self)), self.counts())
        deltas, gold = self.deltas.double(), self.gold[self.covered]
        ends = []
        for reduce in ("amin", "amax"):
            end = deltas.new_zeros(len(self)).scatter_reduce_(0, row, deltas, reduce, include_self=False)
            ends.append(end[self.covered] - deltas[gold])
        return ends[0], ends[1]

    def per_token(self, mu: float) -> tuple[Tensor, Tensor, Tensor]:
        """NLL of each covered gold token at strength mu and its first two derivatives in mu, each float64.

        With q the steered distribution on the kept set: log-sum-exp minus the gold logit, E_q[delta] - delta_y, Var_q[delta].
        """
        covered, counts = self.covered, self.counts()
        row = torch.repeat_interleave(torch.arange(len(self)), counts)
        deltas = self.deltas.double()
        steered = self.logprobs.double() + mu * deltas

        def total(values: Tensor) -> Tensor:
            return torch.segment_reduce(values, "sum", lengths=counts)

        top = torch.segment_reduce(steered, "max", lengths=counts)
        weights = (steered - top[row]).exp()
        mass = total(weights)
        weights = weights / mass[row]
        mean = total(weights * deltas)
        variance = total(weights * (deltas - mean[row]).square())
        gold = self.gold[covered]
        nll = (top + mass.log())[covered] - steered[gold]
        return nll, mean[covered] - deltas[gold], variance[covered]
