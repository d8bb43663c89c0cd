"""What calibration keeps of each gold token, and how it comes out of two models' logits.

Memory: `FIXED_BYTES` = 44 bytes a gold token and `KEPT_BYTES` = 8 bytes for each token of its kept set, whatever the vocabulary
and the model; a batch's dense results live a few rows at a time.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from svdecode.constants import IGNORE_INDEX
from svdecode.ops import fused_steer, steering_vector

FIXED_BYTES, KEPT_BYTES = 44, 8

# Rows whose dense (rows, V) results live at once: few enough for a CPU's cache, many enough to hide a GPU's launches.
_CPU_ROWS, _GPU_ROWS = 16, 1024


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
        """What these statistics take: FIXED_BYTES a gold token and KEPT_BYTES a kept token."""
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
        covered = self.covered
        row = torch.repeat_interleave(torch.arange(len(self)), self.counts())
        deltas = self.deltas.double()
        steered = self.logprobs.double() + mu * deltas

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(len(self)).index_add_(0, row, values)

        top = steered.new_full((len(self),), -math.inf).scatter_reduce_(0, row, steered, "amax")
        weights = (steered - top[row]).exp()
        mass = total(weights)
        weights = weights / mass[row]
        mean = total(weights * deltas)
        variance = total(weights * (deltas - mean[row]).square())
        gold = self.gold[covered]
        nll = (top + mass.log())[covered] - steered[gold]
        return nll, mean[covered] - deltas[gold], variance[covered]


def token_statistics(steered: object, batch: dict[str, Tensor], alpha: float, direction: str) -> TokenStatistics:
    """Statistics of the labelled tokens of one batch, on the CPU; `sequence` counts from the batch's own, or from 0."""
    pre, ft, labels = labelled_logits(steered, batch)
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    limit = _CPU_ROWS if ft.device.type == "cpu" else _GPU_ROWS
    # At least one part, which may be empty.
    chunks = rows.split(limit) if len(rows) else [rows]
    parts = [_of_rows(*_chosen(chunk, pre, ft, labels), alpha, direction) for chunk in chunks]
    found = TokenStatistics.concatenate(parts)
    numbers = batch.get("sequence", torch.arange(len(batch["labels"]))).to(torch.int32)
    found.sequence = numbers.repeat_interleave(len(labels) // len(numbers))[rows.cpu()]
    return found


def labelled_logits(steered: object, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Both models' logits (B * T, V) of a batch's last T positions and the tokens (B * T,) to predict there, -100 for none.

    T reaches back to the first labelled token of the batch: the logits of the prompts, which can be most of the memory, are not
    made where the model can leave them out.
    """
    labels = batch["labels"].to(steered.device)
    used = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()  # position t predicts token t + 1
    width = labels.shape[1] - int(used[0]) if len(used) else 1
    inputs = {name: batch[name].to(steered.device) for name in ("input_ids", "attention_mask") if name in batch}
    forward = getattr(steered, "forward", None)
    if forward is not None and "logits_to_keep" in inspect.signature(forward).parameters:
        inputs["logits_to_keep"] = width
    pre, ft, _ = steered.pair_logits(**inputs, use_cache=False)
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)[:, -width:].to(ft.device)
    return pre[:, -width:].flatten(0, 1), ft[:, -width:].flatten(0, 1), following.flatten()


def _chosen(rows: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The given rows; or, without a copy, the range that holds them, where most of it is wanted."""
    first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
    if last - first <= 2 * len(rows):
        return [tensor[first:last] for tensor in tensors]
    return [tensor[rows] for tensor in tensors]


def _of_rows(pre: Tensor, ft: Tensor, labels: Tensor, alpha: float, direction: str) -> TokenStatistics:
    """Statistics of the labelled ones among rows of logits (R, V)."""
    out = fused_steer(pre, ft, 0.0, labels=labels, alpha=alpha, direction=direction)
    used = labels != IGNORE_INDEX
    row, token = ((out.logprobs > -math.inf) & used[:, None]).nonzero(as_tuple=True)  # ordered by row, then by token
    counts = torch.bincount(row, minlength=len(labels))[used]
    gold = torch.full_like(labels, -1)
    is_gold = (token == labels[row]).nonzero().squeeze(-1)
    gold[row[is_gold]] = is_gold
    deltas = steering_vector(pre, ft, alpha=alpha, direction=direction)
    return TokenStatistics(
        moments=out.moments[used].cpu(),
        mu_star=out.mu_star[used].cpu(),
        kl=out.kl[used].cpu(),
        num_kept=out.num_kept[used].cpu(),
        logprobs=out.logprobs[row, token].cpu(),
        deltas=deltas[row, token].cpu(),
        gold=gold[used].cpu(),
        offsets=(counts.cumsum(0) - counts).cpu(),
        sequence=torch.zeros(len(counts), dtype=torch.int32),
    )
