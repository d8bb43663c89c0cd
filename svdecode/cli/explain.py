"""`svdecode explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdecode.cli.options import STDIN, DeviceMapOption, JsonOption, ModelOption, from_stdin, quiet
from svdecode.common.files import check_writable, to_json
from svdecode.common.terminal import print_table

if TYPE_CHECKING:
    from svdecode.explanation.explanation import Explanation

PAGE = Path("svdecode-explanation.html")
ROWS = 20
"""Changed steps that the terminal shows; the page shows all."""


def explain(
    prompt: Annotated[
        str, typer.Argument(help="The prompt; - reads it from stdin, without the line break at the end.")
    ],
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the adapter.")],
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    mu: Annotated[
        float | None, typer.Option(help="Steering strength. Default: the calibration beside the adapter.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Confidence threshold. Default: the calibration's; with --mu 0.1.")
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(help="For tokens outside the kept set. Default: the calibration's; with --mu -inf.")
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="kl or log_ratio. Default: the calibration's; with --mu kl.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 64,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help=f"File of the page. Default: {PAGE}; with --json no page is written without this option."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what steering changed at each step of an answer.

    Write one HTML page, which needs no network: each token with its candidates under both models and the steered
    distribution, and the answer without steering beside.
    """
    path = PAGE if output is None and not as_json else output
    if path is not None:
        _check_output(path, overwrite)
    text = from_stdin() if prompt == STDIN else prompt
    if not text:
        raise ValueError("the prompt is empty")
    from svdecode.ops.setting import Setting
    from svdecode.strength.calibration import Calibration

    given = {"alpha": alpha, "penalty": penalty, "direction": direction}
    Setting(0.0 if mu is None else mu, **{name: value for name, value in given.items() if value is not None}).check()
    strength = Calibration.from_pretrained(adapter) if mu is None else mu
    quiet()
    from svdecode.explanation.explanation import explain as explain_answer
    from svdecode.models.base_model import load_with_adapter
    from svdecode.models.loading import check_adapter_folder
    from svdecode.models.steer import steer

    check_adapter_folder(adapter)
    adapted, tokenizer = load_with_adapter(model, adapter, device_map)
    steered = steer(adapted, mu=strength, **given)
    found = explain_answer(steered, text, tokenizer, max_new_tokens=max_new_tokens)
    if as_json:
        print(to_json(found.to_dict()), flush=True)
    else:
        _show(found)
    if path is not None:
        found.to_html(path)
        if not as_json:
            print(f"page: {path}")


def _check_output(path: Path, overwrite: bool) -> None:
    """ValueError where the page cannot be written: said before a model is loaded."""
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already: pass --overwrite, or another file as --output")
    check_writable(path.parent)


def _show(found: Explanation) -> None:
    from svdecode.explanation.numbers import change, nats, probability
    from svdecode.explanation.visible_text import label, visible

    print(f"With steering (mu = {found.setting.mu:.4g}):\n{visible(found.answer)}\n")
    print(f"Without steering (mu = 0):\n{visible(found.unsteered_answer)}\n")
    print(found.summary())
    if found.changed_steps:
        rows = []
        for number in found.changed_steps[:ROWS]:
            step = found.steps[number - 1]
            chosen = step.chosen
            numbers = (probability(chosen.warm_start), probability(chosen.steered), change(step.moved), nats(step.kl))
            rows.append([str(number), label(step.without.token), label(chosen.token), *numbers])
        head = ["step", "without", "with", "its probability before", "after", "change", "KL"]
        title = f"The first {ROWS} changed steps" if len(found.changed_steps) > ROWS else "Changed steps"
        print_table(title, head, rows, words=("without", "with"))
