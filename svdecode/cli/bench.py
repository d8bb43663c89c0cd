"""`svdecode bench`: the operators on this machine, beside eager PyTorch. `bench/` in the repository has the full suite."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from svdecode.cli.options import JsonOption
from svdecode.cli.terminal import print_table
from svdecode.common.files import to_json

VOCABULARIES = (49_152, 151_936)
MU = 0.5


def bench(
    rows: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    vocabulary: Annotated[str, typer.Option(help="Vocabulary sizes, separated by commas.")] = ",".join(
        map(str, VOCABULARIES)
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[
        str | None, typer.Option(help="reference, cpu, triton or cuda. Default: the one that svdecode uses here.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds. All variants take turns in each round.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Time the operators and eager PyTorch on this machine.

    The times are medians. GB/s counts the bytes that must move at least.
    """
    import torch
    from tqdm import tqdm

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
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(), "dtype": dtype, "rounds": rounds, "results": found,
    }  # fmt: skip
    if as_json:
        print(to_json(report))
        return
    head = ["operator", "rows", "vocabulary", "ms", "eager ms", "times", "GB/s"]
    table = [
        [
            row["operator"], str(row["rows"]), f"{row['vocabulary']:,}", f"{1e3 * row['seconds']:.3f}",
            f"{1e3 * row['eager_seconds']:.3f}", f"{row['eager_seconds'] / row['seconds']:.1f}",
            f"{row['bytes'] / row['seconds'] / 1e9:.1f}",
        ]
        for row in found
    ]  # fmt: skip
    print_table(f"{report['device']}, {dtype}", head, table, words=("operator",))


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be positive integers separated by commas, got {text!r}")
    return [int(part) for part in parts]


def _measured(pre: object, ft: object, backend: str | None, rounds: int) -> list[dict]:
    """One entry per operator: median seconds here and in eager PyTorch, and the least bytes."""
    import statistics

    import torch

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
        "fused_steer": (lambda: fused_steer(pre, ft, MU, out=out), read + 4 * out.numel()),
        "steer_sample, greedy": (lambda: steer_sample(pre, ft, MU, temperature=0.0), read),
        "steer_sample, top-p": (lambda: steer_sample(pre, ft, MU, top_k=50, top_p=0.9), read),
        "steer_topk, 8 tokens": (lambda: steer_topk(pre, ft, MU, k=8), read),
        "steered_nll, 8 strengths": (lambda: steered_nll(pre, ft, labels, mus), read),
    }
    chosen, seconds = choose(backend, pre, ft), {}
    for turn in range(rounds + 2):
        for name, (run, _) in operators.items():
            for variant in dict.fromkeys((chosen, "reference")):
                with use_backend(variant):
                    start = time.perf_counter()
                    run()
                    if ft.is_cuda:
                        torch.cuda.synchronize()
                    if turn > 1:  # two rounds warm up
                        seconds.setdefault((name, variant), []).append(time.perf_counter() - start)
    return [
        {
            "operator": name, "backend": chosen, "rows": rows, "vocabulary": size, "bytes": moved,
            "seconds": statistics.median(seconds[name, chosen]),
            "eager_seconds": statistics.median(seconds[name, "reference"]),
        }
        for name, (_, moved) in operators.items()
    ]  # fmt: skip
