"""`svdecode calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from svdecode.commands.options import JsonOption, ModelOption, quiet


def calibrate(
    data: Annotated[Path, typer.Option("--data", help='JSONL of {"prompt", "completion"} that training did not see.')],
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the adapter; svdecode.json is written there.")],
    model: ModelOption = None,
    estimator: Annotated[str, typer.Option(help="mean, median, trimmed, ratio, newton or exact.")] = "exact",
    alpha: Annotated[float, typer.Option(help="Confidence threshold.")] = 0.1,
    direction: Annotated[str, typer.Option(help="kl or log_ratio.")] = "kl",
    batch_size: Annotated[int, typer.Option(help="Examples a forward.")] = 8,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write this PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the steering strength and save it beside the adapter."""
    from svdecode.data import read_examples

    examples = read_examples(data)
    quiet()
    from svdecode.calibration import calibrate as estimate
    from svdecode.loading import load_adapter, load_model

    base, tokenizer = load_model(model)
    found = estimate(
        load_adapter(base, adapter),
        examples,
        tokenizer=tokenizer,
        estimator=estimator,
        alpha=alpha,
        direction=direction,
        batch_size=batch_size,
    )
    found.save_pretrained(adapter)
    if plot is not None:
        found.plot(plot)
    if as_json:
        print(json.dumps({k: v for k, v in vars(found).items() if k != "tokens"}))
        return
    console = Console()
    console.print(
        f"mu = {found.mu:.4f} ({found.estimator}); {found.num_tokens} tokens, coverage {found.coverage:.3f}, "
        f"mean KL {found.mean_kl:.4f} nats, kept set {found.kept:.2f} tokens"
    )
    table = Table("estimator", "mu", "NLL at mu", title=f"NLL at 0: {found.curve([0.0]).item():.4f}")
    for name, mu in found.estimates.items():
        table.add_row(name, f"{mu:.4f}", f"{found.curve([mu]).item():.4f}")
    console.print(table)
