"""`svdecode eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdecode.cli.chat_options import (
    CompletionColumnOption,
    PromptColumnOption,
    TurnsOption,
    check_chat,
    reading,
    reread,
)
from svdecode.cli.options import AdapterOption, DeviceMapOption, JsonOption, ModelOption, quiet, writing_to
from svdecode.common.files import to_json
from svdecode.common.terminal import print_table
from svdecode.constants import ALPHA, KL, LOG_RATIO

if TYPE_CHECKING:
    from peft import PeftModel

    from svdecode.evaluation.report import Report

Rows = list[dict[str, object]]


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
            help="A .csv, .tsv, .json, .jsonl, .ndjson or text file; a Hugging Face data set (owner/name, "
            "owner/name:config:split); or a task's own public data (arc_easy, arc_easy:validation). Default: those of --task.",
        ),
    ] = None,
    turns: TurnsOption = None,
    prompt_column: PromptColumnOption = None,
    completion_column: CompletionColumnOption = None,
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    adapter: AdapterOption = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="Part of the data: train, calibration, test or all. Default: test where there are splits."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Take only this many questions, from the first on.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for records, table and figure. An interrupted run goes on there."),
    ] = None,
    mu: Annotated[
        float | None, typer.Option(help="Steering strength. Default: the calibration beside the adapter.")
    ] = None,
    estimator: Annotated[
        list[str] | None,
        typer.Option(help="Compare this estimate of the calibration. May be given several times. Default: all."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help=f"Confidence threshold. Default: the calibration's, else {ALPHA}.")
    ] = None,
    penalty: Annotated[
        float | None,
        typer.Option(
            help="Added to tokens outside the kept set. Default: 0 for given answers, -inf for generated ones."
        ),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="For the commonsense tasks: generate or choices. Default: generate.")
    ] = None,
    few_shot: Annotated[
        Path | None,
        typer.Option("--few-shot", help="File with the examples of TruthfulQA's prompt. Default: the first rows."),
    ] = None,
    decoding: Annotated[
        list[str] | None,
        typer.Option(help="For generated answers: greedy, beam, top-k or top-p. May be given several times."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest generated answer, in tokens. Default: the task's.")
    ] = None,
    calibration_data: Annotated[
        str | None,
        typer.Option(
            "--calibration-data",
            help="Calibrate on these data, which have the task's format. Of a named data set the train split is taken. "
            "log_ratio gets a strength of its own.",
        ),
    ] = None,
    steps: Annotated[
        Path | None,
        typer.Option(
            "--steps",
            help="Folder with checkpoints step-N: show the gain over the warm start's steps. Needs --calibration-data.",
        ),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint of a judge, such as http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Model of the judge at --judge-url; without --judge-url a folder or hub name.")
    ] = None,
    judge_key_env: Annotated[
        str | None, typer.Option(help="Name of the environment variable that holds the judge's key.")
    ] = None,
    verdicts: Annotated[
        Path | None,
        typer.Option(help='File of known verdicts, a {"question", "answer", "true", "informative"} per line.'),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the bootstrap.")] = 0,
    shared_prompt: Annotated[
        bool,
        typer.Option(
            "--shared-prompt/--no-shared-prompt", help="Encode the common beginning of all prompts only once."
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Compare the systems on a task.

    The systems are the pre-trained model, its warm start, SVDecode and SVDecode's ablations. The intervals are paired.
    """
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
    how = reading(prompt_column, completion_column, turns)
    rows = reread(read_rows(data or task), **how)
    shots = None if few_shot is None else read_rows(few_shot)
    calibration_rows = None if calibration_data is None else reread(read_rows(calibration_data, TRAIN), **how)
    _check_strength(adapter, mu, calibration_data, steps)
    rows = part_of(rows, adapter or steps, "test", split)
    chosen.questions(rows, shots)
    if calibration_rows is not None:
        calibration_rows = part_of(calibration_rows, adapter or steps, "calibration")
    quiet()
    check_chat([*rows, *(calibration_rows or ())], model, adapter or steps)
    run = _Run(
        task, rows, calibration_rows, model, device_map, ALPHA if alpha is None else alpha, output, as_json,
        settings={
            "few_shot": shots, "limit": limit, "score": score, "decodings": decoding or ("greedy",), "penalty": penalty,
            "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed, "shared_prompt": shared_prompt,
            "judge": make_judge(judge_url, judge_model, judge_key_env), "verdicts": verdicts, "output": output,
        },
    )  # fmt: skip
    if steps is not None:
        run.steps(steps)
    else:
        run.once(adapter, mu=mu, alpha=alpha, estimators=estimator or None)


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


@dataclass(frozen=True)
class _Run:
    """A checked request: what both kinds of runs share."""

    task: str
    rows: Rows
    calibration_rows: Rows | None
    model: str | None
    device_map: str | None
    calibration_alpha: float
    """Confidence threshold for a calibration that this run makes."""
    output: Path | None
    as_json: bool
    settings: dict[str, Any]
    """Further arguments of `svdecode.evaluation.run.evaluate`."""

    def once(
        self, adapter: Path | None, *, mu: float | None, alpha: float | None, estimators: list[str] | None
    ) -> None:
        """Compare all systems for one adapter, or run the pre-trained model alone."""
        from svdecode.evaluation.run import evaluate as evaluate_task
        from svdecode.evaluation.steps import calibrate_for
        from svdecode.models.base_model import base_name, load_with_adapter
        from svdecode.strength.calibration import Calibration

        own = adapter is not None and mu is None and self.calibration_rows is None
        strength = Calibration.from_pretrained(adapter) if own else mu
        log_ratio_mu = None
        with writing_to(self.output):
            loaded, tokenizer = load_with_adapter(self.model, adapter, self.device_map)
            if self.calibration_rows is not None:
                found = {
                    direction: calibrate_for(
                        self.task, self.calibration_rows, self.rows, loaded, tokenizer,
                        few_shot=self.settings["few_shot"], alpha=self.calibration_alpha, direction=direction,
                        batch_size=self.settings["batch_size"],
                    )
                    for direction in (KL, LOG_RATIO)
                }  # fmt: skip
                strength, log_ratio_mu = found[KL], found[LOG_RATIO].mu
            evaluate_task(
                self.task, self.rows, loaded, tokenizer, mu=strength, alpha=alpha, estimators=estimators,
                log_ratio_mu=log_ratio_mu, name=base_name(self.model, adapter), show=self._show, **self.settings,
            )  # fmt: skip
        self._say_where("records.jsonl, results.json, results.md, results.png")

    def steps(self, folder: Path) -> None:
        """Compare warm start and SVDecode at each checkpoint of a folder."""
        from svdecode.evaluation.steps import checkpoints, evaluate_steps
        from svdecode.models.base_model import base_name, load_base
        from svdecode.models.loading import load_adapter, load_another
        from svdecode.warmstart.folder import step_folder

        adapted: PeftModel | None = None

        def load(checkpoint: Path) -> PeftModel:
            nonlocal adapted
            if adapted is None:
                adapted = load_adapter(base, checkpoint)
                return adapted
            return load_another(adapted, checkpoint)

        with writing_to(self.output):
            first = step_folder(folder, checkpoints(folder)[0])
            base, tokenizer = load_base(self.model, first, self.device_map)
            evaluate_steps(
                self.task, self.rows, folder, load, tokenizer,
                calibration_data=self.calibration_rows, alpha=self.calibration_alpha,
                name=base_name(self.model, first),
                show=self._show_steps, **self.settings,
            )  # fmt: skip
        self._say_where("steps.json, steps.md, steps.png")

    def _show(self, report: Report) -> None:
        if self.as_json:
            print(to_json(report.to_dict()), flush=True)
            return
        print_table(f"{self.task}, {report.model}, {report.questions} questions", *report.figures())
        if report.comparisons:
            print_table(f"difference to {report.baseline}", *report.differences(), words=("", "metric", "verdict"))
        for sentence in report.sentences():
            print(sentence, flush=True)

    def _show_steps(self, rows: list[dict[str, Any]]) -> None:
        from svdecode.evaluation.steps_report import WORTH_CAPTION, steps_tables, worth_sentences
        from svdecode.evaluation.tasks import find_task

        if self.as_json:
            print(to_json({"task": self.task, "steps": rows}), flush=True)
            return
        metric = find_task(self.task, self.settings["score"]).metrics[0].name
        for title, head, lines in steps_tables(rows, metric):
            print_table(f"{self.task} over warm-start steps: {title}", head, lines)
        print("\n".join([WORTH_CAPTION, *worth_sentences(rows)]), flush=True)

    def _say_where(self, files: str) -> None:
        from svdecode.common import distributed

        if self.output is not None and not self.as_json and distributed.is_main():
            print(f"Written to {self.output}: {files}")
