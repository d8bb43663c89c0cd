"""The gain over warm-start steps (the paper's Figure 3): warm start against SVDecode after each checkpoint of one run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from svdecode.calibration.calibrate import calibrate
from svdecode.common import distributed
from svdecode.common.files import to_json, write_atomically
from svdecode.common.tables import markdown_table, with_interval
from svdecode.constants import ALPHA, KL
from svdecode.data.batches import collate, pad_token_id, with_prompt
from svdecode.data.benchmarks import TRAIN
from svdecode.data.sources import read_rows
from svdecode.evaluation.comparison import NOT_KNOWN, verdict
from svdecode.evaluation.figures import plot_steps
from svdecode.evaluation.items import gold_rows, window
from svdecode.evaluation.run import evaluate
from svdecode.evaluation.tasks import find_task
from svdecode.evaluation.tasks.base import Metric, Question, Task
from svdecode.evaluation.tasks.truthfulqa import EXAMPLES
from svdecode.strength.calibration import Calibration
from svdecode.warmstart.train import step_folder

NLL = Metric("NLL", higher_is_better=False)
CAPTION = (
    "Kept gold tokens: the tokens of the right answers that the warm start finds at least alpha times (by default a tenth) as "
    "probable as its likeliest token; by default steering chooses no others. Coverage: their share of all tokens of the right "
    "answers. NLL: mean of minus the log-probability, nats per token; lower is better. Kept NLL: that of kept gold tokens."
)
"""What the words of the steps' table mean."""


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
    batches = _gold_batches(calibration, model, tokenizer, batch_size)
    return calibrate(model, batches, pretrained=pretrained, alpha=alpha, direction=direction, progress=progress)


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
    **settings: object,
) -> list[dict[str, object]]:
    """Calibrate each checkpoint and compare warm start and SVDecode with the exact strength on the test data.

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
        settings: further arguments of `evaluate`.

    Returns:
        One row per checkpoint: step, mu, coverage, "nll" of kept gold tokens (nats) and "nll_difference", "metric" (the task's
        first) and "metric_difference", with intervals and verdicts.
    """
    chosen = find_task(task, settings.get("score"))
    if chosen.judged and settings.get("judge") is None and settings.get("verdicts") is None:
        raise ValueError(f"steps of {task} need a judge or a file of verdicts")
    metric = chosen.metrics[0].name
    steps = checkpoints(folder)
    calibration, test = _questions(chosen, calibration_data, data, few_shot, limit)
    output = None if output is None else Path(output)
    rows = []
    for step in steps:
        model = load(step_folder(folder, step))
        batches = [_gold_batches(part, model, tokenizer, batch_size) for part in (calibration, test)]
        found = calibrate(model, batches[0], held_out=batches[1], alpha=alpha, seed=seed, progress=progress)
        report = evaluate(
            task, data, model, tokenizer, mu=found, estimators=["exact"], ablations=False,
            few_shot=few_shot, limit=limit, batch_size=batch_size, seed=seed, progress=progress,
            output=None if output is None else step_folder(output, step), **settings,
        )  # fmt: skip
        rows.append({"step": step, "mu": found.mu, **held_out_change(found), **_metric_of(report, metric)})
    if show is not None and distributed.is_main():
        show(rows)
    if output is not None and distributed.is_main():
        write_atomically(output / "steps.json", to_json(rows, indent=2).encode())
        write_atomically(output / "steps.md", steps_markdown(rows, task, metric).encode())
        plot_steps(rows, metric, task, output / "steps.png")
    return rows


def steps_markdown(rows: list[dict], task: str, metric: str) -> str:
    """A table of `evaluate_steps`, and one sentence for each checkpoint without a gain."""
    head, lines = steps_table(rows, metric)
    silent = [str(row["step"]) for row in rows if row["nll_difference"]["verdict"] == "no gain is shown"]
    words = (
        f"\nKept NLL: no gain is shown after {', '.join(silent)} steps: the interval contains 0.\n" if silent else ""
    )
    silent = [str(r["step"]) for r in rows if r["metric_difference"].get("verdict") == "no gain is shown"]
    words += (
        f"\n{metric}: no gain is shown after {', '.join(silent)} steps: the interval contains 0.\n" if silent else ""
    )
    return f"# {task}: gain over warm-start steps\n\n{markdown_table(head, lines)}\n{CAPTION}\n{words}"


def steps_table(rows: list[dict], metric: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows; the first NLL in nats per kept gold token."""
    head = ["steps", "coverage", "mu", "kept NLL, warm start", "kept NLL, SVDecode", "difference [95%]",
            f"{metric}, warm start", f"{metric}, SVDecode", "difference [95%]"]  # fmt: skip
    lines = []
    for row in rows:
        nll, scores = row["nll"], row["metric"]
        lines.append([
            str(row["step"]), f"{row['coverage']:.2f}", f"{row['mu']:.2f}",
            f"{nll['warm start']:.3f}", f"{nll['SVDecode']:.3f}", with_interval(row["nll_difference"], "difference", sign="+"),
            *(f"{scores[name]['mean']:.3f}" if name in scores else "" for name in ("warm start", "SVDecode")),
            with_interval(row["metric_difference"], "difference", sign="+"),
        ])  # fmt: skip
    return head, lines


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


def _gold_batches(questions: list[Question], model: object, tokenizer: object, batch_size: int) -> list[dict]:
    """Batches of gold answers after their prompts, for `calibrate` and `collect_tokens`."""
    rows = [row for question in questions for row in gold_rows(question, tokenizer, window(model))]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    encoded = [with_prompt(p, a) for p, a in rows]
    pad = pad_token_id(tokenizer)
    return [collate(encoded[i : i + batch_size], pad) for i in range(0, len(encoded), batch_size)]


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
