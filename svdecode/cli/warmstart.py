"""`svdecode warmstart`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from svdecode.cli.options import DeviceMapOption, JsonOption, ModelOption, quiet
from svdecode.warmstart.figure import plot_training

_PAPER = "left out: the paper's"


def warmstart(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="JSONL, JSON or CSV with prompt and completion (or instruction and output, or TruthfulQA's columns), a "
            "Hugging Face data set (owner/name, owner/name:config:split), or a built-in task of svdecode eval (arc_easy).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for the adapter and its records.")],
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="lora (rank 8, alpha 16, dropout 0.1), ia3, prompt-tuning (20 virtual tokens) or p-tuning-v2 (20, encoder "
            "128 x 2): the paper's presets, with learning rate 5e-5, one epoch, batches of 1 and length 512.",
        ),
    ] = "lora",
    learning_rate: Annotated[float | None, typer.Option(help=f"Peak, then linear decay; {_PAPER} 5e-5.")] = None,
    epochs: Annotated[float | None, typer.Option(help=f"Passes over the data; {_PAPER} 1.")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Examples a forward; {_PAPER} 1.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Forwards a step; left out: 1.")] = None,
    max_length: Annotated[int | None, typer.Option(help=f"Longer examples are cut; {_PAPER} 512.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Steps to the peak, below 1 a share; left out: 0.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's; left out: 0.")] = None,
    rank: Annotated[int | None, typer.Option(help=f"LoRA rank; {_PAPER} 8.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help=f"LoRA scale times rank; {_PAPER} 16.")] = None,
    dropout: Annotated[float | None, typer.Option(help=f"On the LoRA input; {_PAPER} 0.1.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Layers of LoRA or IA3, with commas, or all-linear; left out: by architecture.")
    ] = None,
    virtual_tokens: Annotated[int | None, typer.Option(help=f"Of both tunings; {_PAPER} 20.")] = None,
    prompt_init: Annotated[str | None, typer.Option(help="Prompt tuning: random or vocabulary.")] = None,
    encoder_hidden_size: Annotated[int | None, typer.Option(help=f"Of P-Tuning v2; {_PAPER} 128.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data order, dropout and weights; left out: 0.")] = None,
    split: Annotated[
        bool, typer.Option("--split", help="Train on a part only; the rest stays for calibration and test.")
    ] = False,
    fractions: Annotated[
        str, typer.Option(help="Of --split: train/calibration/test; equal prompts stay in one part.")
    ] = "0.6/0.2/0.2",
    split_seed: Annotated[int, typer.Option(help="Of --split, apart from --seed.")] = 0,
    save_steps: Annotated[str, typer.Option(help="Also save the adapter after these steps, as 8,16,32.")] = "",
    checkpoint_steps: Annotated[int, typer.Option(help="Steps between checkpoints for --resume; 0: none.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run with the same settings stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the warm start that the folder holds.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on prompts and completions, the loss on the completions, with a training curve beside it."""
    quiet()
    from svdecode.common.distributed import is_main
    from svdecode.common.figures import load_pyplot
    from svdecode.data.examples import read_examples
    from svdecode.models.loading import load_model
    from svdecode.warmstart.folder import check_output, read_record
    from svdecode.warmstart.presets import preset
    from svdecode.warmstart.train import warmstart as train

    settings = dict(
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        max_length=max_length,
        warmup=warmup,
        weight_decay=weight_decay,
        rank=rank,
        lora_alpha=lora_alpha,
        dropout=dropout,
        target_modules=_modules(target_modules),
        virtual_tokens=virtual_tokens,
        prompt_init=prompt_init,
        encoder_hidden_size=encoder_hidden_size,
        seed=seed,
    )
    preset(method, **settings)
    steps = _steps(save_steps)
    check_output(output, resume=resume, overwrite=overwrite)
    load_pyplot()  # a missing matplotlib is said before the training, not after
    examples = read_examples(data)
    splits = _splits(examples, data, fractions if split else None, split_seed)
    base, tokenizer = load_model(model, device_map)
    train(
        base,
        tokenizer,
        examples,
        output,
        method=method,
        splits=splits,
        save_steps=steps,
        checkpoint_steps=checkpoint_steps,
        resume=resume,
        overwrite=overwrite,
        **settings,
    )
    if is_main():
        record = read_record(output)
        figure = plot_training(record, output)
        _report(record, splits.sizes, output, figure, as_json)


def _modules(text: str | None) -> str | list[str] | None:
    return text if text is None or text in ("auto", "all-linear") else [name.strip() for name in text.split(",")]


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"save_steps must be integers with commas, like 8,16,32, got {text!r}") from None


def _splits(examples: list[dict[str, str]], data: str, fractions: str | None, seed: int) -> object:
    from svdecode.data.splits import Splits, parse_fractions

    if fractions is None:
        return Splits.everything(examples, data=data)
    return Splits.make(examples, data=data, seed=seed, fractions=parse_fractions(fractions))


def _report(record: dict, sizes: dict[str, int], output: Path, figure: Path, as_json: bool) -> None:
    losses = [entry["loss"] for entry in record["loss"]]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    if as_json:
        shown = {name: value for name, value in record.items() if name not in ("loss", "schema")}
        found = {"output": str(output), "figure": str(figure), "splits": sizes, "loss": {"first": first, "last": last}}
        print(json.dumps(shown | found))
        return
    print(
        f"{record['settings']['method']}: {record['steps']} steps, {record['tokens']} tokens, {record['seconds']:.1f} s, "
        f"loss {first:.3f} in the first tenth of the steps, {last:.3f} in the last"
    )
    print(f"examples: {', '.join(f'{name} {size}' for name, size in sizes.items())}", end="")
    print(f"; {record['cut_away']} left out, max_length cuts them before their completion" * bool(record["cut_away"]))
    print(output)
