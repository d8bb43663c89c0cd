"""`svdecode warmstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdecode.cli.chat_options import CompletionColumnOption, PromptColumnOption, TurnsOption, check_chat, reading
from svdecode.cli.options import DeviceMapOption, JsonOption, ModelOption, quiet, writing_to
from svdecode.common.files import to_json


def warmstart(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Data with prompt and completion, instruction and output, question and answer, TruthfulQA's columns, or chat "
            "data with messages: a .jsonl, .ndjson, .json, .csv or .tsv file, also compressed; a Parquet file; a Hugging Face "
            "data set (owner/name, owner/name:config:split); or a task of svdecode eval (arc_easy).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for the adapter and its records.")],
    turns: TurnsOption = None,
    prompt_column: PromptColumnOption = None,
    completion_column: CompletionColumnOption = None,
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="One of the paper's presets: lora (rank 8, alpha 16, dropout 0.1), ia3, prompt-tuning (20 virtual tokens) "
            "or p-tuning-v2 (20 virtual tokens, encoder 128 x 2).",
        ),
    ] = "lora",
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate, which then falls linearly. Default: 5e-5, the paper's.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. Default: 1, the paper's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per forward. Default: 1, the paper's.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Forwards per step. Default: 1.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Cut longer examples to this many tokens. Default: 512, the paper's.")
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help="Steps until the highest learning rate; below 1, a share of all steps. Default: 0."),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW. Default: 0.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of LoRA. Default: 8, the paper's.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Alpha of LoRA: scale times rank. Default: 16.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout on LoRA's input. Default: 0.1, the paper's.")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="Layers for LoRA or IA3, separated by commas, or all-linear. Default: chosen by the model's architecture."
        ),
    ] = None,
    virtual_tokens: Annotated[
        int | None, typer.Option(help="Virtual tokens of prompt tuning and P-Tuning v2. Default: 20, the paper's.")
    ] = None,
    prompt_init: Annotated[
        str | None, typer.Option(help="Start of prompt tuning: random or vocabulary. Default: random.")
    ] = None,
    encoder_hidden_size: Annotated[
        int | None, typer.Option(help="Width of P-Tuning v2's encoder. Default: 128, the paper's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the data order, the dropout and the first weights. Default: 0.")
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="Train on a part only; keep the rest for calibration and test.")
    ] = False,
    fractions: Annotated[
        str, typer.Option(help="Shares of --split: train/calibration/test. Equal prompts stay in one part.")
    ] = "0.6/0.2/0.2",
    split_seed: Annotated[int, typer.Option(help="Seed of --split. --seed does not change the parts.")] = 0,
    save_steps: Annotated[
        str, typer.Option(help="Save the adapter after these steps too, separated by commas: 8,16,32.")
    ] = "",
    checkpoint_steps: Annotated[int, typer.Option(help="Steps between checkpoints for --resume; 0 for none.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run with the same settings stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the warm start that the folder holds.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on prompts and completions.

    The loss counts the completions only. The training curve is drawn beside the adapter.
    """
    quiet()
    from svdecode.common.distributed import is_main
    from svdecode.common.figures import load_pyplot
    from svdecode.data.examples import read_examples
    from svdecode.models.loading import load_model
    from svdecode.warmstart.figure import plot_training
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
    how = reading(prompt_column, completion_column, turns)
    steps = _steps(save_steps)
    check_output(output, resume=resume, overwrite=overwrite)
    load_pyplot()  # a missing matplotlib is said before the training, not after
    with writing_to(output):
        examples = read_examples(data, **how)
        splits = _splits(examples, data, fractions if split else None, split_seed)
        check_chat(examples, model)
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
        _report(record, splits.sizes, output, as_json)
        plot_training(record, output)


def _modules(text: str | None) -> str | list[str] | None:
    return text if text is None or text in ("auto", "all-linear") else [name.strip() for name in text.split(",")]


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"save_steps must be integers separated by commas, like 8,16,32, got {text!r}") from None


def _splits(examples: list[dict[str, str]], data: str, fractions: str | None, seed: int) -> object:
    from svdecode.data.splits import Splits, parse_fractions

    if fractions is None:
        return Splits.everything(examples, data=data)
    return Splits.make(examples, data=data, seed=seed, fractions=parse_fractions(fractions))


def _report(record: dict, sizes: dict[str, int], output: Path, as_json: bool) -> None:
    losses = [entry["loss"] for entry in record["loss"]]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    if as_json:
        from svdecode.warmstart.folder import FIGURE_NAME

        shown = {name: value for name, value in record.items() if name not in ("loss", "schema")}
        found = {"output": str(output), "figure": str(output / FIGURE_NAME), "splits": sizes}
        print(to_json(shown | found | {"loss": {"first": first, "last": last}}))
        return
    print(
        f"{record['settings']['method']}: {record['steps']} steps, {record['tokens']} tokens, {record['seconds']:.1f} s, "
        f"loss {first:.3f} in the first tenth of the steps, {last:.3f} in the last"
    )
    print(f"examples: {', '.join(f'{name} {size}' for name, size in sizes.items())}", end="")
    print(f"; {record['cut_away']} left out, max_length cuts them before their completion" * bool(record["cut_away"]))
    print(output)
