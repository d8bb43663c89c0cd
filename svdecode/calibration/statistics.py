"""What one batch adds to a calibration, out of both models' logits; dense results live a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from svdecode.calibration.row_nll import nll_of, rows_of
from svdecode.constants import IGNORE_INDEX, PENALTY
from svdecode.models.forward_inputs import last_logits, positions_of, takes
from svdecode.models.rows_of_both import PACKED
from svdecode.models.steered_model import SteeredModel
from svdecode.ops.fused_steer import fused_steer
from svdecode.strength.family import TEMPERATURE, Family
from svdecode.strength.token_statistics import GoldTokens

# Rows whose dense (rows, V) results live at once: few enough for a CPU's cache, many enough to hide a GPU's launches.
_CPU_ROWS, _GPU_ROWS = 16, 256


class Sums(NamedTuple):
    """Of the B sequences of a batch under one family, at M strengths."""

    curve: Tensor  # (B, M, 3) float64
    ends: Tensor  # (B, 2) float64
    scored: Tensor  # (B,) int64
    tokens: GoldTokens | None  # None for a temperature


class BatchStatistics(NamedTuple):
    """Of the B sequences of a batch, on the CPU."""

    sequence: Tensor  # (B,) int64: their indices in the data
    gold: Tensor  # (B,) int64: gold tokens of each
    families: dict[Family, Sums]


class GoldRows(NamedTuple):
    """Both models' logits where a batch has a gold token to predict: R rows of B sequences."""

    pre: Tensor  # (R, V)
    ft: Tensor  # (R, V)
    labels: Tensor  # (R,) int64
    owner: Tensor  # (R,) int64, on the CPU: the row's sequence, as an index into `sequence`
    sequence: Tensor  # (B,) int64, on the CPU: the sequences' indices in the data

    @property
    def bytes(self) -> int:
        """What the logits take."""
        return self.pre.nbytes + self.ft.nbytes


def gold_rows(steered: SteeredModel, batch: dict[str, Tensor]) -> GoldRows:
    """One forward of both models over a batch."""
    pre, ft, labels = labelled_logits(steered, batch)
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    count = len(batch["labels"])
    numbers = batch.get("sequence", torch.arange(count)).to(torch.int64)
    return GoldRows(pre[rows], ft[rows], labels[rows], rows.cpu() // (len(labels) // count), numbers)


def batch_statistics(rows: GoldRows, mus: Mapping[Family, Tensor], tokens: bool = True) -> BatchStatistics:
    """Of the gold tokens of one batch, for each family at its strengths; `tokens`: the gold tokens' own values too."""
    limit = _CPU_ROWS if rows.ft.device.type == "cpu" else _GPU_ROWS
    count = len(rows.sequence)
    found: dict[Family, list[tuple]] = {family: [] for family in mus}
    # One part at least, which may be empty.
    for pre, ft, labels in zip(*(part.split(limit) for part in rows[:3]), strict=True):
        values = rows_of(pre, ft, labels)
        for family, at in mus.items():
            nll = nll_of(values, family, at)
            own = _gold_tokens(pre, ft, labels, family) if tokens and family.direction != TEMPERATURE else None
            found[family].append((*(part.cpu() for part in nll), own))
    families = {family: _summed(parts, rows.owner, count, rows.sequence) for family, parts in found.items()}
    return BatchStatistics(rows.sequence, torch.bincount(rows.owner, minlength=count), families)


def _summed(parts: list[tuple], owner: Tensor, count: int, numbers: Tensor) -> Sums:
    sums, ends, scored, tokens = zip(*parts, strict=True)

    def per_sequence(values: tuple[Tensor, ...]) -> Tensor:
        joined = torch.cat(values)
        return joined.new_zeros(count, *joined.shape[1:]).index_add_(0, owner, joined)

    own = None
    if tokens[0] is not None:
        own = GoldTokens.concatenate(list(tokens))
        own.sequence = numbers[owner].to(torch.int32)
    return Sums(per_sequence(sums), per_sequence(ends), per_sequence(tuple(one.long() for one in scored)), own)


def _gold_tokens(pre: Tensor, ft: Tensor, labels: Tensor, family: Family) -> GoldTokens:
    out = fused_steer(pre, ft, 0.0, labels=labels, **family._replace(penalty=PENALTY).keywords)  # to see what is kept
    kept = out.logprobs.gather(1, labels[:, None]).squeeze(1) > -torch.inf
    values = (out.moments, out.mu_star, out.kl, out.num_kept, kept, torch.zeros_like(labels, dtype=torch.int32))
    return GoldTokens(*(value.cpu() for value in values))


def labelled_logits(steered: SteeredModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Both models' logits (B * T, V) of a batch's last T positions and the tokens (B * T,) to predict there, -100 for none.

    T reaches back to the first labelled token of the batch: the logits of the prompts, which can be most of the memory, are not
    made where the model can leave them out.
    """
    labels = batch["labels"].to(steered.device, torch.int64)
    used = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()  # position t predicts token t + 1
    width = labels.shape[1] - int(used[0]) if len(used) else 1
    inputs = {
        name: value.to(steered.device)
        for name, value in batch.items()
        if isinstance(value, Tensor) and name != "labels" and (takes(steered, name) or name in PACKED)
    }
    if _needs_positions(steered, inputs):
        inputs["position_ids"] = positions_of(inputs["attention_mask"])
    pre, ft, _ = steered.pair_logits(**inputs, use_cache=False, **last_logits(steered, width))
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)[:, -width:].to(ft.device)
    return pre[:, -width:].flatten(0, 1), ft[:, -width:].flatten(0, 1), following.flatten()


def _needs_positions(steered: SteeredModel, inputs: dict[str, Tensor]) -> bool:
    """Whether rows have padding on the left: a model counts it unless it is told the positions, or finds them in the mask."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or inputs.get("position_ids") is not None or bool(mask[:, 0].all()):
        return False
    inner = getattr(steered, "base_model", steered)
    return takes(steered, "position_ids") and not hasattr(inner, "get_rope_index")
