"""The gain over warm-start steps (the paper's Figure 3): warm start against SVDecode after each checkpoint of one run.

And beyond the paper: the best way of decoding each checkpoint, against its best temperature, and what that is worth in steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from svdecode.calibration.calibrate import calibrate
from svdecode.common import distributed
from svdecode.common.files import to_json, write_atomically
from svdecode.constants import ALPHA, KL
from svdecode.data.batches import with_prompt
from svdecode.data.benchmarks import TRAIN
from svdecode.data.sources import read_rows
from svdecode.evaluation.comparison import NOT_KNOWN, verdict
from svdecode.evaluation.items import gold_rows, window
from svdecode.evaluation.report import Report
from svdecode.evaluation.run import evaluate
from svdecode.evaluation.steps_figure import plot_steps
from svdecode.evaluation.steps_report import steps_markdown
from svdecode.evaluation.tasks import find_task
from svdecode.evaluation.tasks.base import Metric, Question, Task
from svdecode.evaluation.tasks.truthfulqa import EXAMPLES
from svdecode.strength.calibration import Calibration
from svdecode.strength.family import TEMPERATURE
from svdecode.strength.worth import worths
from svdecode.warmstart.train import step_folder

NLL = Metric("NLL", higher_is_better=False)


def checkpoints(folder: str | Path) -> list[int]:
    """The steps whose adapters `svdecode warmstart` saved in a folder, in order; ValueError where there is none."""
    folder = Path(folder)
    names = [path.parent.name for path in folder.glob("step-*/adapter_config.json")]
    steps = sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name))
    if not steps:
        raise ValueError(f"{folder} has no checkpoint step-N (svdecode warmstart writes them)")
    return steps


def calibrate_for(
    task: str,
    calibration_data: object,
    data: object,
    model: object,
    tokenizer: object,
    *,
    pretrained: object | None = None,
    few_shot: object | None = None,
    alpha: float = ALPHA,
    direction: str = KL,
    batch_size: int = 8,
    progress: bool = True,
) -> Calibration:
    """Calibrate on the gold answers of a task's own data, under the task's own prompts.

    Args:
        task: one of `svdecode.evaluation.tasks.TASKS`.
        calibration_data: in the task's format; a question that is also in `data` is refused.
        data: the test data.
        model: a PeftModel, or any causal LM together with `pretrained`.
        tokenizer: theirs.
        pretrained, few_shot, batch_size, progress: as in `svdecode.evaluation.run.evaluate`.
        alpha, direction: as in `svdecode.calibrate`.
    """
    calibration, _ = _questions(find_task(task), calibration_data, data, few_shot)
    return calibrate(
        model, _gold_tokens(calibration, model, tokenizer), pretrained=pretrained, tokenizer=tokenizer, alpha=alpha,
        direction=direction, batch_size=batch_size, compare=False, progress=progress,
    )  # fmt: skip


def evaluate_steps(
    task: str,
    data: object,
    folder: str | Path,
    load: Callable[[Path], object],
    tokenizer: object,
    *,
    calibration_data: object,
    alpha: float = ALPHA,
    few_shot: object | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    output: str | Path | None = None,
    progress: bool = True,
    show: Callable[[list[dict]], None] | None = None,
    known: Mapping[int, tuple[Calibration, Report]] | None = None,
    **settings: object,
) -> list[dict[str, object]]:
    """Calibrate each checkpoint and compare warm start, best temperature and steering on the test data.

    Args:
        task: one of `svdecode.evaluation.tasks.TASKS`.
        data: test data, as in `evaluate`.
        folder: with the checkpoints, step-N each.
        load: gives the adapted model of one checkpoint's folder.
        tokenizer: of the model.
        calibration_data: in the task's format; a question that is also in `data` is refused.
        alpha: confidence threshold.
        few_shot, limit, batch_size, seed, progress: as in `evaluate`.
        output: folder for steps.json, steps.md and steps.png, and one folder per checkpoint, where an interrupted run goes on.
        show: called by the first process with the rows before they are saved.
        known: by step, a checkpoint's calibration and report, made as here: with the test data held out, with the same seed and
            settings. It is not read again where these are the same sequences, in the same order, as the other checkpoints'.
        settings: further arguments of `evaluate`.

    Returns:
        One row per checkpoint: step; mu, coverage, "nll" of kept gold tokens (nats) and "nll_difference" under the paper's
        setting; "metric" (the task's first) and "metric_difference"; and, over all gold tokens and the whole vocabulary,
        "best", "temperature", "warm_start" (see `best_way`) and "worth" (see `svdecode.strength.worth.worths`). With intervals.
    """
    chosen = find_task(task, settings.get("score"))
    if chosen.judged and settings.get("judge") is None and settings.get("verdicts") is None:
        raise ValueError(f"steps of {task} need a judge or a file of verdicts")
    metric = chosen.metrics[0].name
    steps = checkpoints(folder)
    calibration, test = _questions(chosen, calibration_data, data, few_shot, limit)
    output = None if output is None else Path(output)
    rows, judged = [], []
    first: Calibration | None = None
    for step in steps:
        found, report = (known or {}).get(step, (None, None))
        if found is None or (first is not None and not _same_data(found, first)):
            model = load(step_folder(folder, step))
            parts = [_gold_tokens(part, model, tokenizer) for part in (calibration, test)]
            found = calibrate(
                model, parts[0], held_out=parts[1], tokenizer=tokenizer, alpha=alpha, batch_size=batch_size, seed=seed,
                progress=progress,
            )  # fmt: skip
            report = evaluate(
                task, data, model, tokenizer, mu=found, estimators=["exact"], ablations=False,
                few_shot=few_shot, limit=limit, batch_size=batch_size, seed=seed, progress=progress,
                output=None if output is None else step_folder(output, step), **settings,
            )  # fmt: skip
        first = first or found
        row = {"step": step, "mu": found.mu, **held_out_change(found), **_metric_of(report, metric), **best_way(found)}
        rows.append(row)
        judged.append([found.judged[row[name]["name"]] for name in ("warm_start", "best")])
    warm, best = zip(*judged, strict=True)
    for row, worth in zip(rows, worths(steps, warm, best, seed), strict=True):
        row["worth"] = worth
    if show is not None and distributed.is_main():
        show(rows)
    if output is not None and distributed.is_main():
        write_atomically(output / "steps.json", to_json(rows, indent=2).encode())
        write_atomically(output / "steps.md", steps_markdown(rows, task, metric).encode())
        plot_steps(rows, metric, task, output / "steps.png")
    return rows


def _questions(
    task: Task, calibration_data: object, data: object, few_shot: object | None, limit: int | None = None
) -> tuple[list[Question], list[Question]]:
    """Calibration and test questions, with the same examples in their prompts, and none in both."""
    rows = read_rows(data)
    shots = None if few_shot is None else read_rows(few_shot)
    test = task.questions(rows, shots)
    if shots is None and task.takes_few_shot:
        shots = rows[:EXAMPLES]
    calibration = task.questions(read_rows(calibration_data, TRAIN), shots)
    shared = {(q.prompt, q.completion) for q in calibration} & {(q.prompt, q.completion) for q in test}
    if shared:
        first = min(prompt or completion for prompt, completion in shared)
        raise ValueError(f"{len(shared)} calibration questions are test questions too, such as {first[-60:]!r}")
    return calibration, test[:limit]


def _gold_tokens(questions: list[Question], model: object, tokenizer: object) -> list[dict[str, list[int]]]:
    """The gold answers after their prompts as token ids, in the order of the questions, for `calibrate`."""
    return [with_prompt(*row) for question in questions for row in gold_rows(question, tokenizer, window(model))]


def _same_data(one: Calibration, other: Calibration) -> bool:
    return (one.data, one.held_out_data) == (other.data, other.held_out_data)


def best_way(calibration: Calibration) -> dict[str, dict[str, object]]:
    """Over the whole vocabulary: the better direction at its best strength, the best temperature, and the warm start.

    Args:
        calibration: made with `compare` and `held_out`.

    Returns:
        "best", "temperature" and "warm_start", each a row of the fair table (`svdecode.strength.fair_table.fair_table`): name,
        direction, mu, nll, gain and interval over the warm start, over_temperature. Which direction is the better one is seen
        on the same tokens.
    """
    rows = [row for row in calibration.table if row["scored"] == "all"]
    steering = [row for row in rows if row["over_temperature"] is not None]
    return {
        "best": min(steering, key=lambda row: row["nll"]),
        "temperature": next(row for row in rows if row["direction"] == TEMPERATURE),
        "warm_start": next(row for row in rows if row["direction"] is None),
    }


def held_out_change(calibration: Calibration) -> dict[str, object]:
    """What a strength does on data that did not choose it, as in a row of `evaluate_steps`.

    Args:
        calibration: made with `held_out`.

    Returns:
        "coverage": the share of the held-out gold tokens that is kept; "nll": their mean NLL in nats under "warm start" and
        "SVDecode"; "nll_difference": SVDecode minus warm start, with a bootstrap interval over the sequences (None with a
        single one) and a verdict.

    Raises:
        ValueError: a calibration without held-out data.
    """
    if "held_out" not in calibration.gains:
        raise ValueError("this calibration has no held-out data: pass held_out= to svdecode.calibrate")
    found = calibration.gains["held_out"]
    # A gain is how much the NLL falls; here it is how the NLL changes.
    ends = None if found["interval"] is None else [-end for end in reversed(found["interval"])]
    return {
        "coverage": found["coverage"],
        "nll": {"warm start": found["nll_at_0"], "SVDecode": found["nll_at_mu"]},
        "nll_difference": {
            "difference": -found["gain"],
            "interval": ends,
            "verdict": NOT_KNOWN if ends is None else verdict(NLL, *ends),
        },
    }


def _metric_of(report: object, metric: str) -> dict[str, object]:
    results, comparisons = report.results.get(metric, {}), report.comparisons.get(metric, {})
    ours = "SVDecode (exact)"
    names = {"warm start": "warm start", ours: "SVDecode"}
    scores = {short: results[name] for name, short in names.items() if name in results}
    return {"metric": scores, "metric_difference": comparisons.get(ours, {})}
