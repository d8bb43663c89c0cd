"""`svdecode calibrate`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from svdecode.cli.options import DeviceMapOption, JsonOption, ModelOption, quiet

if TYPE_CHECKING:
    from svdecode.strength.calibration import Calibration


def calibrate(
    data: Annotated[
        str,
        typer.Option(
            "--data", help="As in svdecode warmstart; of data that were split there, the calibration part is used."
        ),
    ],
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the adapter; svdecode.json is written there.")],
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out", help="Data that show whether it helps; left out: one half of the data judges the other."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="train, calibration, test or all; left out: calibration where there are splits."),
    ] = None,
    estimator: Annotated[str, typer.Option(help="mean, median, trimmed, ratio, newton or exact.")] = "exact",
    select: Annotated[
        str | None,
        typer.Option("--select", help="Choose mu, alpha, penalty and direction by this metric: nll or exact_match."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Confidence threshold.")] = 0.1,
    direction: Annotated[str, typer.Option(help="kl or log_ratio.")] = "kl",
    batch_size: Annotated[int, typer.Option(help="Examples a forward.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Cut longer examples after so many tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and the halves.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Figure; left out: svdecode-calibration.png beside the adapter.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the steering strength, say how sure it is and whether it helps, and save it beside the adapter.

    Started by `torchrun` or `accelerate launch`, the processes share the data; the first one writes and prints.
    """
    figure = _figure(plot, adapter)
    from svdecode.data.benchmarks import TEST
    from svdecode.data.examples import read_examples
    from svdecode.data.splits import part_of

    examples = part_of(read_examples(data), adapter, "calibration", split)
    others = None if held_out is None else read_examples(held_out, TEST)
    _check(estimator, select, alpha, direction)
    quiet()
    from svdecode.calibration.calibrate import calibrate as estimate
    from svdecode.common.distributed import is_main, wait
    from svdecode.models.loading import load_adapter, load_model

    base, tokenizer = load_model(model, device_map)
    found = estimate(
        load_adapter(base, adapter),
        examples,
        tokenizer=tokenizer,
        estimator=estimator,
        alpha=alpha,
        direction=direction,
        batch_size=batch_size,
        held_out=others,
        select=select,
        max_length=max_length,
        seed=seed,
    )
    if is_main():
        from svdecode.calibration.report import write_report

        found.save_pretrained(adapter)
        report = write_report(found, adapter, figure=figure)
        if as_json:
            print(json.dumps(found.to_dict()))
        else:
            _show(found, report, figure)
    wait()  # a process that leaves early would look dead to the others


def _check(estimator: str, select: str | None, alpha: float, direction: str) -> None:
    """What is wrong with the options, before a model is loaded."""
    from svdecode.ops import validation
    from svdecode.strength.estimators import ESTIMATORS

    validation.check_settings(alpha, direction)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if select is not None:
        from svdecode.calibration.selection import check_metric

        check_metric(select)


def _figure(plot: Path | None, adapter: Path) -> Path | None:
    """Where the figure goes; None where it is not asked for and matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        from svdecode.calibration.report import FIGURE_NAME

        return plot or adapter / FIGURE_NAME
    if plot is not None:
        raise ImportError("--plot needs matplotlib: pip install 'svdecode[train]'")
    return None


def _show(found: Calibration, report: Path, figure: Path | None) -> None:
    from svdecode.common.tables import bounds

    console = Console()
    penalty = "" if found.penalty is None else f", penalty {found.penalty}"
    console.print(
        f"mu = {found.mu:.4f} ({found.estimator}; alpha {found.alpha}, {found.direction}{penalty}); "
        f"{found.num_tokens} tokens of {found.num_sequences} sequences, coverage {found.coverage:.3f}, "
        f"mean KL {found.mean_kl:.4f} nats, kept set {found.kept:.2f} tokens",
        highlight=False,
    )
    table = Table("estimator", "mu", "95% interval", "NLL at mu", title=f"NLL at 0: {found.curve([0.0]).item():.4f}")
    for name, mu in found.estimates.items():
        nll = found.curve([mu]).item()
        table.add_row(name, f"{mu:.4f}", bounds(found.intervals.get(name)).replace("[", "\\["), f"{nll:.4f}")
    console.print(table)
    console.print(found.verdict(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {report}" + (f", figure: {figure}" if figure else ""), highlight=False, soft_wrap=True)
