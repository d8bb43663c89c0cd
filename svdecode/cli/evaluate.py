"""`svdecode eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from svdecode.cli.options import AdapterOption, DeviceMapOption, JsonOption, ModelOption, quiet
from svdecode.common.files import to_json


def evaluate(
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="truthfulqa_mc, truthfulqa_gen, boolq, piqa, social_i_qa, hellaswag, winogrande, arc_easy, "
            "arc_challenge, openbookqa, exact_match or nll.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="CSV, JSON, JSONL or text file, a Hugging Face data set (owner/name, owner/name:config:split), or a "
            "task's own public data (arc_easy, arc_easy:validation); left out: those of --task.",
        ),
    ] = None,
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    adapter: AdapterOption = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="train, calibration, test or all; left out: test where the warm start has splits."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="The first so many questions alone.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for records, table and figure; a run goes on there.")
    ] = None,
    mu: Annotated[float | None, typer.Option(help="Strength; left out: the calibration beside the adapter.")] = None,
    estimator: Annotated[
        list[str] | None, typer.Option(help="Compare this estimate of the calibration; repeatable; left out: all.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Confidence threshold; left out: the calibration's, or 0.1.")
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(help="Left out: 0 where whole answers are scored, -inf for generation.")
    ] = None,
    score: Annotated[str | None, typer.Option(help="Commonsense tasks: generate (the default) or choices.")] = None,
    few_shot: Annotated[
        Path | None,
        typer.Option("--few-shot", help="File with the examples of TruthfulQA's prompt; else the first rows."),
    ] = None,
    decoding: Annotated[
        list[str] | None, typer.Option(help="greedy, beam, top-k or top-p, for generated answers; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of a generated answer.")] = None,
    calibration_data: Annotated[
        str | None,
        typer.Option(
            "--calibration-data",
            help="Calibrate on this, in the task's format (of a name the train split); log_ratio gets its own strength.",
        ),
    ] = None,
    steps: Annotated[
        Path | None,
        typer.Option(
            "--steps", help="Folder of checkpoints step-N: gain over warm-start steps; needs --calibration-data."
        ),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint, as http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Model there; without --judge-url a folder or hub name.")
    ] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="Name of the environment variable with the key.")] = None,
    verdicts: Annotated[
        Path | None, typer.Option(help='JSONL of {"question", "answer", "true", "informative"}: known verdicts.')
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a forward.")] = 8,
    seed: Annotated[int, typer.Option(help="Of sampling and of the bootstrap.")] = 0,
    shared_prompt: Annotated[
        bool, typer.Option("--shared-prompt/--no-shared-prompt", help="Encode what all prompts begin with once.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Compare pre-trained, warm start, SVDecode and its ablations on a task, with paired intervals."""
    from svdecode.data.benchmarks import BENCHMARKS, TRAIN
    from svdecode.data.sources import read_rows
    from svdecode.data.splits import part_of
    from svdecode.evaluation.judge import make_judge
    from svdecode.evaluation.tasks import find_task

    chosen = find_task(task, score)
    if not chosen.judged and (judge_url, judge_model, judge_key_env, verdicts) != (None,) * 4:
        raise ValueError(f"a judge is for truthfulqa_gen, not for {task}")
    if data is None and task not in BENCHMARKS:
        raise ValueError(f"--data is needed: {task} has no data of its own")
    rows = read_rows(data or task)
    shots = None if few_shot is None else read_rows(few_shot)
    calibration_rows = None if calibration_data is None else read_rows(calibration_data, TRAIN)
    _check_strength(adapter, mu, calibration_data, steps)
    rows = part_of(rows, adapter or steps, "test", split)
    chosen.questions(rows, shots)
    if calibration_rows is not None:
        calibration_rows = part_of(calibration_rows, adapter or steps, "calibration")
    quiet()
    judge = make_judge(judge_url, judge_model, judge_key_env)
    shared = {
        "few_shot": shots, "limit": limit, "score": score, "decodings": decoding or ("greedy",), "penalty": penalty,
        "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed, "shared_prompt": shared_prompt,
        "judge": judge, "verdicts": verdicts, "output": output,
    }  # fmt: skip
    if steps is not None:
        _steps(task, rows, steps, model, device_map, calibration_rows, 0.1 if alpha is None else alpha, shared, as_json)
    else:
        _once(task, rows, model, device_map, adapter, mu, alpha, estimator, calibration_rows, shared, as_json)


def _check_strength(adapter: Path | None, mu: float | None, calibration_data: str | None, steps: Path | None) -> None:
    """What needs what, before a model is loaded."""
    from svdecode.evaluation.steps import checkpoints

    if steps is not None:
        if adapter is not None or mu is not None:
            raise ValueError(
                "--steps takes the adapters and their strengths from the checkpoints: no --adapter, no --mu"
            )
        if calibration_data is None:
            raise ValueError("--steps needs --calibration-data: each checkpoint has a strength of its own")
        checkpoints(steps)
        return
    if adapter is None and (mu is not None or calibration_data is not None):
        raise ValueError("--mu and --calibration-data need --adapter: the pre-trained model alone is not steered")
    if mu is not None and calibration_data is not None:
        raise ValueError("pass --mu or --calibration-data, not both")


def _once(task, rows, model, device_map, adapter, mu, alpha, estimator, calibration_rows, shared, as_json) -> None:
    from svdecode.common import distributed
    from svdecode.evaluation.run import evaluate as run
    from svdecode.evaluation.steps import calibrate_for
    from svdecode.models.loading import BUNDLED_NAME, load_adapter, load_model
    from svdecode.strength.calibration import Calibration

    own = adapter is not None and mu is None and calibration_rows is None
    strength = Calibration.from_pretrained(adapter) if own else mu
    loaded, tokenizer = load_model(model, device_map)
    log_ratio_mu = None
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    if calibration_rows is not None:
        found = {
            direction: calibrate_for(
                task, calibration_rows, rows, loaded, tokenizer,
                few_shot=shared["few_shot"], alpha=0.1 if alpha is None else alpha, direction=direction,
                batch_size=shared["batch_size"],
            )
            for direction in ("kl", "log_ratio")
        }  # fmt: skip
        strength, log_ratio_mu = found["kl"], found["log_ratio"].mu
    report = run(
        task, rows, loaded, tokenizer, mu=strength, alpha=alpha, estimators=estimator or None,
        log_ratio_mu=log_ratio_mu, name=model or BUNDLED_NAME, **shared,
    )  # fmt: skip
    if not distributed.is_main():
        return
    if as_json:
        print(to_json(report.to_dict()))
        return
    console = _console()
    console.print(_table(f"{task}, {report.model}, {report.questions} questions", *report.figures()))
    if report.comparisons:
        console.print(_table(f"difference to {report.baseline}", *report.differences()))
    for sentence in report.sentences():
        console.print(sentence, markup=False)
    if shared["output"] is not None:
        console.print(
            f"Written to {shared['output']}: records.jsonl, results.json, results.md, results.png", markup=False
        )


def _steps(task, rows, steps, model, device_map, calibration_rows, alpha, shared, as_json) -> None:
    from svdecode.common import distributed
    from svdecode.evaluation.steps import evaluate_steps, steps_table
    from svdecode.evaluation.tasks import find_task
    from svdecode.models.loading import BUNDLED_NAME, load_adapter, load_model

    base, tokenizer = load_model(model, device_map)

    adapted = None

    def load(folder: Path) -> object:
        nonlocal adapted
        if adapted is None:
            adapted = load_adapter(base, folder)
        else:
            adapted.load_adapter(str(folder), adapter_name=folder.name)
            adapted.set_adapter(folder.name)
        return adapted

    found = evaluate_steps(
        task, rows, steps, load, tokenizer,
        calibration_data=calibration_rows, alpha=alpha, name=model or BUNDLED_NAME, **shared,
    )  # fmt: skip
    if not distributed.is_main():
        return
    if as_json:
        print(to_json({"task": task, "steps": found}))
        return
    metric = find_task(task, shared["score"]).metrics[0].name
    console = _console()
    console.print(_table(f"{task}: gain over warm-start steps", *steps_table(found, metric)))
    if shared["output"] is not None:
        console.print(f"Written to {shared['output']}: steps.json, steps.md, steps.png", markup=False)


def _console() -> Console:
    return Console(width=max(Console().width, 110))


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    return table
