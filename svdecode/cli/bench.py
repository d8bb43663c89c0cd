"""`svdecode bench`: the operators on this machine, beside eager PyTorch. `bench/` in the repository has the full suite."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from svdecode.cli.options import JsonOption
from svdecode.common.files import to_json
from svdecode.common.terminal import print_table

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARIES = (49_152, 151_936)
MU = 0.5


def bench(
    rows: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    vocabulary: Annotated[str, typer.Option(help="Vocabulary sizes, separated by commas.")] = ",".join(
        map(str, VOCABULARIES)
    ),
    dtype: Annotated[str, typer.Option(help="Of the logits: float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[
        str | None, typer.Option(help="reference, cpu, triton or cuda. Left out: the one that svdecode picks.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each operator is timed. All take turns.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Time the operators against eager PyTorch on this machine.

    Times are medians. fused_steer is timed twice: both sides write into a buffer that is reused, or both return a fresh
    tensor. GB/s are the least bytes that must move (both inputs once, the output once) over the time.
    """
    import torch
    from tqdm import tqdm

    from svdecode.common.timing import processor_name
    from svdecode.models.loading import device

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be a positive integer, got {rounds}")
    shapes = [(r, v) for v in _numbers("vocabulary", vocabulary) for r in _numbers("rows", rows)]
    found = []
    for count, size in tqdm(shapes, desc="bench", unit="shape", file=sys.stderr):
        torch.manual_seed(0)
        ft = (3 * torch.randn(count, size, device=device())).to(getattr(torch, dtype))
        pre = (ft + 0.5 * torch.randn_like(ft)).contiguous()
        found += _measured(pre, ft, backend, rounds)
    report = {
        "device": processor_name(device().type), "threads": torch.get_num_threads(), "dtype": dtype, "rounds": rounds,
        "results": found,
    }  # fmt: skip
    if as_json:
        print(to_json(report))
        return
    head = ["operator", "rows x V", "ms", "eager ms", "times", "GB/s"]
    table = [
        [
            row["operator"], f"{row['rows']} x {row['vocabulary']:,}", f"{1e3 * row['seconds']:.3f}",
            f"{1e3 * row['eager_seconds']:.3f}", f"{row['eager_seconds'] / row['seconds']:.1f}",
            f"{row['bytes'] / row['seconds'] / 1e9:.1f}",
        ]
        for row in found
    ]  # fmt: skip
    title = f"{report['device']}, {report['threads']} CPU threads, {dtype}"
    print_table(title, head, table, words=("operator", "rows x V"))


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be positive integers separated by commas, got {text!r}")
    return [int(part) for part in parts]


def _measured(pre: Tensor, ft: Tensor, backend: str | None, rounds: int) -> list[dict]:
    """One entry per operator: median seconds here and in eager PyTorch, and the least bytes."""
    import statistics

    import torch

    from svdecode.common.timing import in_turns
    from svdecode.ops.backends import choose, use_backend
    from svdecode.ops.fused_steer import fused_steer
    from svdecode.ops.steer_sample import steer_sample
    from svdecode.ops.steer_topk import steer_topk
    from svdecode.ops.steered_nll import steered_nll

    rows, size = ft.shape
    labels = torch.randint(size, (rows,), device=ft.device)
    mus = torch.linspace(-1, 2, 8, device=ft.device)
    out = torch.empty(rows, size, device=ft.device)
    read = 2 * pre.numel() * pre.element_size()
    operators: dict[str, tuple[Callable[[], object], int]] = {
        "fused_steer, out=": (lambda: fused_steer(pre, ft, MU, out=out), read + 4 * out.numel()),
        "fused_steer": (lambda: fused_steer(pre, ft, MU), read + 4 * out.numel()),
        "steer_sample, greedy": (lambda: steer_sample(pre, ft, MU, temperature=0.0), read),
        "steer_sample, top-p": (lambda: steer_sample(pre, ft, MU, top_k=50, top_p=0.9), read),
        "steer_topk, k=8": (lambda: steer_topk(pre, ft, MU, k=8), read),
        "steered_nll, 8 mus": (lambda: steered_nll(pre, ft, labels, mus), read),
    }
    chosen = choose(backend, pre, ft)

    def on(variant: str, run: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            with use_backend(variant):
                run()

        return call

    calls = {(name, way): on(way, run) for name, (run, _) in operators.items() for way in (chosen, "reference")}
    seconds = in_turns(calls, device=ft.device.type, rounds=(rounds, rounds))
    return [
        {
            "operator": name, "backend": chosen, "rows": rows, "vocabulary": size, "bytes": moved,
            "seconds": statistics.median(seconds[name, chosen]),
            "eager_seconds": statistics.median(seconds[name, "reference"]),
        }
        for name, (_, moved) in operators.items()
    ]  # fmt: skip
