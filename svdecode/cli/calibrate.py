"""`svdecode calibrate`."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdecode.cli.chat_options import CompletionColumnOption, PromptColumnOption, TurnsOption, check_chat, reading
from svdecode.cli.options import DeviceMapOption, JsonOption, ModelOption, quiet, writing_to
from svdecode.common.files import check_writable, to_json
from svdecode.common.terminal import print_table
from svdecode.constants import ALPHA, KL, PENALTY

if TYPE_CHECKING:
    from svdecode.strength.calibration import Calibration


def calibrate(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Data as for svdecode warmstart. Of data that were split there, the calibration part is used.",
        ),
    ],
    adapter: Annotated[
        Path, typer.Option("--adapter", help="Folder of the adapter. svdecode.json is written into it.")
    ],
    turns: TurnsOption = None,
    prompt_column: PromptColumnOption = None,
    completion_column: CompletionColumnOption = None,
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            help="Data that show whether steering helps. Default: each half of the data judges the strength of the other half.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="Part of the data: train, calibration, test or all. Default: calibration where the adapter has splits.",
        ),
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="Estimator of the strength: mean, median, trimmed, ratio, newton or exact.")
    ] = "exact",
    select: Annotated[
        str | None,
        typer.Option("--select", help="Choose mu, alpha, penalty and direction by a metric: nll or exact_match."),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Confidence threshold: keep tokens with this share of the top probability, or more.")
    ] = ALPHA,
    direction: Annotated[str, typer.Option(help="kl or log_ratio.")] = KL,
    penalty: Annotated[
        float | None,
        typer.Option(help="Penalty, 0 or less, that the strength is found for. Default: -inf, as in the paper."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            help="Compare with the best temperature and with both directions, masked and over the whole vocabulary."
        ),
    ] = True,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Save the recommended setting in place of the paper's or the named one.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Examples per forward.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Cut longer examples to this many tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of the halves.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="File of the figure. Default: svdecode-calibration.png in the adapter's folder."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the steering strength for an adapter.

    Show how sure the strength is and whether it helps, and save it beside the adapter.

    Started by `torchrun` or `accelerate launch`, the processes share the data; the first one writes and prints.
    """
    figure = _figure(plot, adapter)
    from svdecode.data.benchmarks import TEST
    from svdecode.data.examples import read_examples
    from svdecode.data.splits import part_of

    how = reading(prompt_column, completion_column, turns)
    examples = part_of(read_examples(data, **how), adapter, "calibration", split)
    others = None if held_out is None else read_examples(held_out, TEST, **how)
    _check(estimator, select, alpha, direction, penalty, recommend)
    if figure is not None:
        check_writable(figure.parent)
    quiet()
    from svdecode.calibration.calibrate import calibrate as estimate
    from svdecode.common.distributed import is_main, wait
    from svdecode.models.base_model import load_with_adapter
    from svdecode.models.loading import check_adapter_folder

    check_adapter_folder(adapter)
    with writing_to(adapter):
        check_chat([*examples, *(others or ())], model, adapter)
        adapted, tokenizer = load_with_adapter(model, adapter, device_map)
        found = estimate(
            adapted,
            examples,
            tokenizer=tokenizer,
            estimator=estimator,
            alpha=alpha,
            direction=direction,
            penalty=penalty,
            compare=compare,
            recommend=recommend,
            batch_size=batch_size,
            held_out=others,
            select=select,
            max_length=max_length,
            seed=seed,
        )
    if is_main():
        _show(found, as_json, model, adapter, recommend)
        _save(found, adapter, figure, as_json)
    wait()  # a process that leaves early would look dead to the others


def _check(
    estimator: str, select: str | None, alpha: float, direction: str, penalty: float | None, recommend: bool
) -> None:
    """What is wrong with the options, before a model is loaded."""
    from svdecode.ops import validation
    from svdecode.strength.estimators import ESTIMATORS

    validation.check_settings(alpha, direction, PENALTY if penalty is None else penalty)
    if recommend and select is not None:
        raise ValueError("--recommend and --select both choose the setting: pass one of them")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if select is not None:
        from svdecode.calibration.metrics import check_metric

        check_metric(select)


def _figure(plot: Path | None, adapter: Path) -> Path | None:
    """Where the figure goes; None where it is not asked for and matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        from svdecode.calibration.report import FIGURE_NAME

        if plot is not None:
            from svdecode.common.figures import figure_format

            figure_format(plot)
        return plot or adapter / FIGURE_NAME
    if plot is not None:
        raise ImportError("--plot needs matplotlib: pip install 'svdecode[train]'")
    return None


def _show(found: Calibration, as_json: bool, model: str | None, adapter: Path, recommend: bool) -> None:
    from svdecode.common.tables import bounds

    if as_json:
        print(to_json(found.to_dict()), flush=True)
        return
    penalty = "" if found.penalty is None else f", penalty {found.penalty}"
    print(
        f"mu = {found.mu:.4f} ({found.estimator}; alpha {found.alpha}, {found.direction}{penalty})\n"
        f"{found.num_tokens} tokens of {found.num_sequences} sequences, coverage {found.coverage:.3f}, "
        f"mean KL {found.mean_kl:.4f} nats, kept set {found.kept:.2f} tokens"
    )
    rows = [
        [name, f"{mu:.4f}", bounds(found.intervals.get(name)), f"{found.curve([mu]).item():.4f}"]
        for name, mu in found.estimates.items()
    ]
    title = f"NLL at 0: {found.curve([0.0]).item():.4f}"
    print_table(title, ["estimator", "mu", "95% interval", "NLL at mu"], rows, words=("estimator",))
    print(found.verdict())
    for caution in found.cautions:
        print(f"Caution: {caution['text']}")
    if found.recommendation is not None:
        from svdecode.strength.fair_table import CAPTION, TITLE, table_cells

        print_table(TITLE, *table_cells(found.table), words=())
        print(CAPTION)
        print(
            f"{found.recommendation['text']}\n{_next_command(found.recommendation['use'], model, adapter, recommend)}"
        )
    sys.stdout.flush()


def _next_command(use: str, model: str | None, adapter: Path, recommend: bool) -> str:
    """What to type next."""
    options = "" if model is None else f"--model {shlex.quote(model)} "
    mu = "" if use == "steering" else " --mu 0"
    command = f'svdecode generate {options}--adapter {shlex.quote(str(adapter))}{mu} "..."'
    if use == "steering" and not recommend:
        return f"The same command with --recommend saves that. Then: {command}"
    return f"Next: {command}"


def _save(found: Calibration, adapter: Path, figure: Path | None, as_json: bool) -> None:
    """Save what has been shown already: a disk that is full by now does not lose it."""
    from svdecode.calibration.report import write_report

    found.save_pretrained(adapter)
    report = write_report(found, adapter, figure=figure)
    if not as_json:
        print(f"report: {report}" + (f", figure: {figure}" if figure else ""))
