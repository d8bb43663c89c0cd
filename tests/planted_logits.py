"""Models whose logits are a table, so that a test plants them: token i of the input is row i of the table."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import svdecode
from svdecode.strength.family import TEMPERATURE, Family
from svdecode.strength.token_statistics import TokenStatistics


class TableConfig(PretrainedConfig):
    model_type = "table"
    num_hidden_layers = 1


class TableLM(PreTrainedModel, GenerationMixin):
    """logits[b, t] = table[input_ids[b, t]]."""

    config_class = TableConfig

    def __init__(self, table: Tensor) -> None:
        super().__init__(TableConfig(vocab_size=table.shape[1]))
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids, attention_mask=None, cache=None, past_key_values=None, use_cache=False, **_):
        return CausalLMOutput(logits=self.table[input_ids])


def planted(pre: Tensor, ft: Tensor, labels: Tensor, length: int, batch_size: int = 4) -> tuple[TableLM, TableLM, list]:
    """Pre-trained and adapted model, and batches of sequences of `length` gold tokens, for rows (N, V) and labels (N,)."""
    rows = torch.arange(len(labels)).split(length)
    batches = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        width = max(map(len, chunk))
        ids, gold = torch.zeros(len(chunk), width + 1, dtype=torch.int64), torch.full((len(chunk), width + 1), -100)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(chunk):
            ids[i, : len(row)], gold[i, 1 : len(row) + 1], mask[i, : len(row) + 1] = row, labels[row], 1
        batches.append({"input_ids": ids, "labels": gold, "attention_mask": mask})
    return TableLM(pre).eval(), TableLM(ft).eval(), batches


def statistics(pre: Tensor, ft: Tensor, labels: Tensor, family: Family, length: int = 1) -> TokenStatistics:
    """The statistics of planted rows, as calibration collects them."""
    from svdecode.calibration.collect import collect

    first, second, batches = planted(pre, ft, labels, length)
    return collect(second, batches, [family], pretrained=first).tokens(family)


def planted_rows(count: int, vocabulary: int = 200, seed: int = 0):
    """Logits of two models, and gold tokens drawn from the steered distribution, so that the best strength is of order 1."""
    draw = torch.Generator().manual_seed(seed)
    pre = 2 * torch.randn(count, vocabulary, generator=draw)
    ft = pre + torch.randn(count, vocabulary, generator=draw)
    target = svdecode.fused_steer(pre, ft, 0.8, alpha=0.0, direction="log_ratio").logprobs
    return pre, ft, torch.multinomial(target.exp(), 1, generator=draw).squeeze(1)


def reference_nll(pre, ft, labels, family: Family, mus) -> torch.Tensor:
    """(M,) mean NLL of the tokens that are scored."""
    mus = torch.as_tensor(mus, dtype=torch.float64)
    if family.direction == TEMPERATURE:
        scores = ft.double().log_softmax(-1)[:, None] * (1 + mus[None, :, None])
        found = -scores.log_softmax(-1).gather(2, labels[:, None, None].expand(-1, len(mus), 1)).squeeze(2)
        return found.mean(0)
    found = svdecode.steered_nll(
        pre.double(), ft.double(), labels, mus, alpha=family.alpha, penalty=family.penalty,
        direction=family.direction, backend="reference",
    )  # fmt: skip
    return found[found[:, 0].isfinite()].mean(0)


def best_of_a_grid(pre, ft, labels, family: Family) -> float:
    """The best strength of a dense grid, made ever finer around its best point."""
    low, high = (-0.95, 9.0) if family.direction == TEMPERATURE else (-50.0, 50.0)
    for _ in range(12):
        grid = torch.linspace(low, high, 201, dtype=torch.float64)
        best = int(reference_nll(pre, ft, labels, family, grid).argmin())
        low, high = grid[max(best - 1, 0)].item(), grid[min(best + 1, 200)].item()
    return (low + high) / 2
