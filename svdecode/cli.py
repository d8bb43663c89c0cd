"""The command line: results on stdout, progress on stderr, exit status 2 with one line for what was wrong."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:  # pragma: no cover
    raise SystemExit(f"svdecode: the command line needs {error.name}: pip install 'svdecode[cli]'") from None

app = typer.Typer(
    help="Steering Vector Decoding: combine a pre-trained model with its warm start at every decoding step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or hub name; left out: SmolLM2-135M-Instruct.")
]
AdapterOption = Annotated[Path | None, typer.Option("--adapter", help="Folder of a PEFT adapter.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def info(as_json: JsonOption = False) -> None:
    """What is installed here, and which backends can run."""
    import torch

    from svdecode import __version__, backends

    packages = {}
    for name in ("torch", "triton", "transformers", "peft"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = backends()
    if as_json:
        rows = {name: backend._asdict() for name, backend in found.items()}
        report = {"svdecode": __version__, "python": platform.python_version(), "packages": packages, "gpu": gpu}
        print(json.dumps({**report, "backends": rows}))
        return
    console = Console()
    console.print(f"svdecode {__version__}, Python {platform.python_version()}, GPU: {gpu or 'none'}")
    console.print(", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items()))
    table = Table("backend", "here", "why")
    for name, backend in found.items():
        table.add_row(name, "yes" if backend.available else "no", backend.reason)
    console.print(table)


@app.command()
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
    _quiet()
    from svdecode.demo.report import print_report
    from svdecode.demo.run import Demo

    report = Demo(model=model, adapter=adapter, data=data, output=output, seed=seed, progress=True).run()
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)


@app.command()
def warmstart(
    data: Annotated[Path, typer.Option("--data", help='JSONL of {"prompt", "completion"}.')],
    output: Annotated[Path, typer.Option("--output", help="Folder for the adapter.")],
    model: ModelOption = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 4,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    seed: Annotated[int, typer.Option(help="Of data order, dropout and weights.")] = 0,
) -> None:
    """Train a LoRA on prompts and completions, the loss on the completions."""
    from svdecode.data import read_examples

    examples = read_examples(data)
    _quiet()
    from svdecode.loading import load_model
    from svdecode.warmstart import warmstart as train

    base, tokenizer = load_model(model)
    train(
        base,
        tokenizer,
        examples,
        output,
        learning_rate=learning_rate,
        batch_size=batch_size,
        epochs=epochs,
        rank=rank,
        seed=seed,
    )
    print(output)


@app.command()
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
    _quiet()
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


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the adapter.")],
    model: ModelOption = None,
    mu: Annotated[float | None, typer.Option(help="Strength; left out: the calibration beside the adapter.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the most probable tokens of this mass.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Answer a prompt from the steered distribution."""
    from svdecode.calibration import Calibration

    strength = Calibration.from_pretrained(adapter) if mu is None else mu
    _quiet()
    import torch

    from svdecode.decoding import generate as decode
    from svdecode.loading import load_adapter, load_model
    from svdecode.steering import steer

    base, tokenizer = load_model(model)
    settings = {} if mu is not None else {"alpha": strength.alpha, "direction": strength.direction}
    steered = steer(load_adapter(base, adapter), mu=strength, **settings)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(steered.device)
    tokens = decode(
        steered,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(steered.device).manual_seed(seed),
    )
    print(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))


def main() -> None:
    """Entry point: what the user got wrong is one line and exit status 2; what we got wrong is a traceback."""
    try:
        app()
    except (ValueError, ImportError) as error:
        print(f"svdecode: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
