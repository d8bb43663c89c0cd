"""`svdecode demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdecode.cli.options import AdapterOption, JsonOption, ModelOption, quiet
from svdecode.common.files import to_json


def demo(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    data: Annotated[
        Path | None, typer.Option("--data", help='JSONL of {"prompt", "completion"}; left out: facts about countries.')
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Adapter, report and figure go here.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option("--seed", help="Of the splits and the warm start.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Warm-start a model, calibrate the strength, and compare pre-trained, warm start and SVDecode on a test split."""
    quiet()
    from svdecode.demo.report import print_report
    from svdecode.demo.run import run

    report = run(model=model, adapter=adapter, data=data, output=output, seed=seed)
    if as_json:
        print(to_json(report))
    else:
        print_report(report)
