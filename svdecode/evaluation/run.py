"""`evaluate`: every system on the same questions, over one or several processes, resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from svdecode.common import distributed
from svdecode.common.files import to_json, write_atomically
from svdecode.data.conversations import TURNS, Row
from svdecode.data.examples import examples_of
from svdecode.data.sources import read_rows
from svdecode.data.splits import prompt_key
from svdecode.evaluation.figures import plot_report
from svdecode.evaluation.generation import DECODINGS
from svdecode.evaluation.items import check_length, chunks, encode_items, window
from svdecode.evaluation.judge import Judge
from svdecode.evaluation.records import Records
from svdecode.evaluation.report import Report, summarise, usual_answers
from svdecode.evaluation.runner import Runner, run_all
from svdecode.evaluation.systems import System, baselines_of, common_name, named, select_systems
from svdecode.evaluation.tasks import find_task
from svdecode.evaluation.tasks.base import TEXT
from svdecode.evaluation.verdicts import FILE_NAME as VERDICTS
from svdecode.evaluation.verdicts import judge_records, read_verdicts
from svdecode.models.adapters import adapter_fingerprint, causal_lm_of
from svdecode.ops import validation
from svdecode.ops.setting import Setting
from svdecode.strength.calibration import Calibration, saved_calibration
from svdecode.strength.cautions import about_judges, about_strength, few


def evaluate(
    task: str,
    data: object,
    model: object,
    tokenizer: object,
    *,
    pretrained: object | None = None,
    mu: float | Calibration | None = None,
    log_ratio_mu: float | None = None,
    alpha: float | None = None,
    penalty: float | None = None,
    estimators: Sequence[str] | None = None,
    ablations: bool = True,
    few_shot: object | None = None,
    limit: int | None = None,
    score: str | None = None,
    decodings: Sequence[str] = ("greedy",),
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    shared_prompt: bool = True,
    judge: Judge | None = None,
    verdicts: str | Path | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    progress: bool = True,
    show: Callable[[Report], None] | None = None,
) -> Report:
    """Compare pre-trained model, warm start, SVDecode and its ablations on one task.

    One forward of both models scores all systems; for generated answers each system has a pass of its own. Under
    `accelerate launch` or `torchrun` the questions are shared out; the first process judges, and writes the report.

    Args:
        task: one of `svdecode.evaluation.tasks.TASKS`.
        data: rows, a Dataset, a file, or the name of a data set or built-in task (`svdecode.data.sources.numbered_rows`).
        model: a PeftModel; any causal LM together with `pretrained`; or a model alone, which is then the one system.
        tokenizer: theirs.
        pretrained: the pre-trained model, where it does not lie under the adapter.
        mu: a Calibration, of which every estimate is compared, or one strength; None takes the calibration that is known
            for the adapter in this process.
        log_ratio_mu: strength for direction="log_ratio", calibrated for it; None leaves that system out.
        alpha: confidence threshold; None takes the calibration's, or 0.1.
        penalty: lambda <= 0; None is 0.0 where whole answers are scored, because a penalty of -inf would rank them by their
            tokens outside the kept set, and -inf for generation.
        estimators: names of the calibration's estimates to compare; None for all.
        ablations: compare the paper's ablations too.
        few_shot: rows or a file with the examples of TruthfulQA's prompt; None takes the first rows of the data.
        limit: at most so many questions (or windows of text), from the first on.
        score: "generate" or "choices", for the commonsense tasks; None is "generate".
        decodings: names of `svdecode.evaluation.generation.DECODINGS`, for generated answers.
        max_new_tokens: of a generated answer; None takes the task's.
        batch_size: rows a forward.
        seed: of the sampled decodings and of the bootstrap.
        shared_prompt: encode what all prompts begin with once.
        judge: of generated TruthfulQA answers; None leaves answers without a verdict unjudged.
        verdicts: a file of verdicts that are known (`svdecode.evaluation.verdicts.read_verdicts`).
        output: folder for records.jsonl, results.json, results.md and results.png; a run that was interrupted goes on there.
        name: of the model, for the report.
        progress: show a bar on stderr.
        show: called by the first process with the report before it is saved, so that a full disk does not lose it.

    Raises:
        ValueError: a wrong argument, unusable data, no strength, or an `output` made with other settings; before any forward.
    """
    start = time.perf_counter()
    chosen = find_task(task, score)
    _check(chosen, limit, batch_size, decodings, few_shot, judge, verdicts, max_new_tokens)
    known = {} if verdicts is None else read_verdicts(Path(verdicts))
    rows = read_rows(data)
    shots = None if few_shot is None else read_rows(few_shot)
    items = encode_items(chosen, chosen.questions(rows, shots), tokenizer, limit, window(model))
    new_tokens = max_new_tokens or chosen.max_new_tokens
    check_length(items, model, new_tokens)
    systems = select_systems(chosen, model, pretrained, mu, log_ratio_mu, alpha, penalty, estimators, ablations)
    names = named(chosen, systems, decodings)
    label = name or str(getattr(causal_lm_of(model).config, "_name_or_path", "") or type(model).__name__)
    settings = {
        "task": task, "how": chosen.how, "data": _digest(rows), "few_shot": None if shots is None else _digest(shots),
        "limit": limit, "model": label, "adapter": adapter_fingerprint(model), "seed": seed,
        "systems": {key: system.key for key, (system, _) in names.items()},
        **({"batch_size": batch_size, "max_new_tokens": new_tokens} if chosen.how == TEXT else {}),
    }  # fmt: skip
    folder = None if output is None else Path(output)
    records = Records(folder, settings)

    pending = [c for c in chunks(chosen, items, batch_size) if any(i.index not in records.found for i in c)]
    tokens = 0
    if pending:
        runner = Runner(
            chosen, model, pretrained, tokenizer, names, items,
            batch_size=batch_size, seed=seed, max_new_tokens=new_tokens, shared_prompt=shared_prompt,
        )  # fmt: skip
        new = run_all(runner, distributed.shard(pending), records, progress)
        tokens = int(sum(distributed.gather([runner.tokens])))
        records.found |= {record["index"]: record for record in new}
    found = [records.found[item.index] for item in items]
    unjudged: dict[str, int] = {}
    if chosen.judged and distributed.is_main():
        references = {item.index: item.question.gold for item in items}
        kept = None if folder is None else folder / VERDICTS
        unjudged = judge_records(found, references, judge=judge, known=known, path=kept, progress=progress)
    baselines = baselines_of(names)
    results, comparisons = summarise(chosen, found, list(names), baselines, seed)
    cautions = _cautions(model, mu, rows, systems, len(items))
    report = Report(
        task=task,
        model=label,
        questions=len(items),
        systems={key: _described(system) for key, (system, _) in names.items()},
        results=results,
        comparisons=comparisons,
        baseline=common_name(baselines),
        notes=_notes(chosen, rows, shots, judge, known, names),
        usual_answers=usual_answers(found, list(names)),
        cautions=cautions,
        unjudged=unjudged,
        seconds=round(time.perf_counter() - start, 2),
        tokens=tokens,
        records=found,
    )
    if distributed.is_main():
        if show is not None:
            show(report)
        records.finish(found)
        if folder is not None:
            save_report(report, folder)
    return report


def save_report(report: Report, folder: str | Path) -> None:
    """Write results.json, results.md and results.png, each atomically."""
    folder = Path(folder)
    write_atomically(folder / "results.json", to_json(report.to_dict(), indent=2).encode())
    write_atomically(folder / "results.md", report.markdown().encode())
    plot_report(report, folder / "results.png")


def _cautions(model: object, mu: object, rows: list[dict], systems: list[System], count: int) -> list[dict[str, str]]:
    """Those of the calibration, of few questions, and of questions that chose the strength."""
    if len(systems) < 2:
        return []
    found = few(count, "questions")
    fingerprint = adapter_fingerprint(model)
    calibration = saved_calibration(fingerprint) if mu is None else mu
    if isinstance(calibration, Calibration):
        found += about_strength(calibration)
        examples = examples_of(rows) or []
        keys = [prompt_key(example) for example in examples]
        found += about_judges(sum(key in calibration.prompts for key in keys), len(keys), "questions")
    return found


def _described(system: System) -> dict[str, object]:
    return dict.fromkeys(Setting._fields) if system.setting is None else system.setting._asdict()


def _notes(task, rows, shots, judge, known, names) -> list[str]:
    found = list(task.notes(rows, shots))
    if task.judged and judge is None and not known:
        found.append(
            "No judge was asked: the answers are in the records, to be judged with --judge-model or --verdicts."
        )
    systems = [system for system, _ in names.values() if system.setting is not None]
    if systems and task.how != TEXT:
        found.append(
            f"Whole answers are scored, with a penalty of {systems[-1].setting.penalty:g} outside the kept set."
        )
    return found


def _check(task, limit, batch_size, decodings, few_shot, judge, verdicts, max_new_tokens) -> None:
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None:
            validation.check_count(name, value)
    unknown = [name for name in decodings if name not in DECODINGS]
    if unknown or not decodings:
        raise ValueError(f"decoding must be one of {', '.join(DECODINGS)}, got {', '.join(decodings) or 'none'}")
    if task.how != TEXT and tuple(decodings) != ("greedy",):
        raise ValueError(f"decoding is for generated answers; {task.name} scores given ones")
    if few_shot is not None and not task.takes_few_shot:
        raise ValueError(f"few_shot is for the TruthfulQA tasks, not for {task.name}")
    if not task.judged and (judge is not None or verdicts is not None):
        raise ValueError(f"a judge is for truthfulqa_gen, not for {task.name}")


def _digest(rows: list[dict]) -> str:
    """SHA-256 of rows, which names them in the header of a run."""
    turns = [row.turns for row in rows if isinstance(row, Row) and row.turns != TURNS[0]]
    named = [rows, turns] if turns else rows
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()
