"""Count the bytes that each kernel loads and stores, in the interpreter, and compare them with the minimum.

    python bench/traffic.py [--json] [--vocabulary N]

Minimum (method, section 4): read both rows once, and write the log-probs once where they are asked for. Every element that a
kernel loads counts each time, also where a GPU would find it in a cache, and so do the buffers between the launches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
from inputs import gold_labels, peaked_logits
from torch import Tensor
from triton.runtime import interpreter

import svdecode
from svdecode.common.tables import markdown_table


@dataclass
class Traffic:
    """Bytes moved between kernels and memory."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        """Both ways."""
        return self.loaded + self.stored


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count what interpreted kernels load and store inside the block."""
    traffic = Traffic()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(self, ptrs, mask, *rest):
        result = load(self, ptrs, mask, *rest)
        traffic.loaded += int(np.count_nonzero(mask.data)) * result.data.dtype.itemsize
        return result

    def counting_store(self, ptrs, value, mask, *rest):
        traffic.stored += int(np.count_nonzero(mask.data)) * value.data.dtype.itemsize
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def flat_logits(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits so alike that every token is kept at alpha = 0.1."""
    torch.manual_seed(0)
    return tuple((0.1 * torch.randn(rows, vocabulary)).to(dtype) for _ in range(2))


def measure(vocabulary: int, rows: int = 1) -> list[dict[str, object]]:
    """One row of the table for each operator, on peaked and on flat rows."""
    labels = gold_labels(rows, vocabulary)
    read, write = 2 * 2 * rows * vocabulary, 4 * rows * vocabulary
    mus = torch.tensor([0.0, 0.5, 1.0, 2.0])
    operators = {
        "fused_steer": (read + write, lambda a, z: svdecode.fused_steer(a, z, 0.5)),
        "fused_steer, labels": (read + write, lambda a, z: svdecode.fused_steer(a, z, labels=labels)),
        "fused_steer, return_kl=False": (read + write, lambda a, z: svdecode.fused_steer(a, z, 0.5, return_kl=False)),
        "fused_steer, penalty=-1": (read + write, lambda a, z: svdecode.fused_steer(a, z, 0.5, penalty=-1.0)),
        "steering_vector, alpha=0.1": (read + write, lambda a, z: svdecode.steering_vector(a, z, alpha=0.1)),
        "optimal_strength": (read, lambda a, z: svdecode.optimal_strength(a, z, labels)),
        "steered_nll, 4 strengths": (read, lambda a, z: svdecode.steered_nll(a, z, labels, mus)),
        "steer_sample, greedy": (read, lambda a, z: svdecode.steer_sample(a, z, 0.5, temperature=0.0)),
        "steer_topk, 8 tokens": (read, lambda a, z: svdecode.steer_topk(a, z, 0.5, k=8)),
        "steer_sample, temperature 1": (read, lambda a, z: svdecode.steer_sample(a, z, 0.5)),
    }
    table = []
    for kind, make in (("peaked", peaked_logits), ("flat", flat_logits)):
        pre, ft = make(rows, vocabulary, torch.bfloat16)
        for name, (minimum, call) in operators.items():
            with counted() as traffic:
                call(pre, ft)
            table.append(
                {
                    "rows": kind,
                    "operator": name,
                    "minimum": minimum,
                    "loaded": traffic.loaded,
                    "stored": traffic.stored,
                    "ratio": traffic.total / minimum,
                }
            )
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    arguments = parser.parse_args()
    with svdecode.use_backend("triton"):
        table = measure(arguments.vocabulary)
    if arguments.json:
        print(json.dumps(table))
        return
    print(f"One row of V = {arguments.vocabulary:,}, bfloat16 in, float32 out; bytes.\n")
    columns = ("minimum", "loaded", "stored")
    rows = [
        [row["rows"], row["operator"], *(f"{row[name]:,}" for name in columns), f"{row['ratio']:.3f}"] for row in table
    ]
    print(markdown_table(["rows", "operator", *columns, "of the minimum"], rows), end="")


if __name__ == "__main__":
    main()
