"""Models whose logits are a table, so that a test plants them: token i of the input is row i of the table."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from svdecode.strength.family import Family
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
