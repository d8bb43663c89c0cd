"""Token statistics of one batch, out of both models' logits; dense results live a few rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdecode.constants import IGNORE_INDEX, Direction
from svdecode.models.forward_inputs import last_logits, positions_of, takes
from svdecode.models.rows_of_both import PACKED
from svdecode.models.steered_model import SteeredModel
from svdecode.ops.fused_steer import fused_steer
from svdecode.ops.steering_vector import steering_vector
from svdecode.strength.token_statistics import TokenStatistics

# Rows whose dense (rows, V) results live at once: few enough for a CPU's cache, many enough to hide a GPU's launches.
_CPU_ROWS, _GPU_ROWS = 16, 1024


def token_statistics(
    steered: SteeredModel, batch: dict[str, Tensor], alpha: float, direction: Direction
) -> TokenStatistics:
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


def _chosen(rows: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The given rows; or, without a copy, the range that holds them, where most of it is wanted."""
    first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
    if last - first <= 2 * len(rows):
        return [tensor[first:last] for tensor in tensors]
    return [tensor[rows] for tensor in tensors]


def _of_rows(pre: Tensor, ft: Tensor, labels: Tensor, alpha: float, direction: Direction) -> TokenStatistics:
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
