"""`svdecode demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdecode.cli.options import AdapterOption, JsonOption, ModelOption, quiet, writing_to
from svdecode.common.files import to_json


def demo(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help='File with a {"prompt", "completion"} per line. Default: facts about countries.'),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for the adapter, the report and the figure.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the splits and of the warm start.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Run all steps on a small task and compare.

    Warm-start a model, calibrate the strength, and compare pre-trained, warm start and SVDecode on a test split.
    """
    quiet()
    from svdecode.demo.report import print_report
    from svdecode.demo.run import run

    with writing_to(output):
        report = run(model=model, adapter=adapter, data=data, output=output, seed=seed)
    if as_json:
        print(to_json(report))
    else:
        print_report(report)
