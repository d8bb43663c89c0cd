"""The demo, a script: warm start, calibrate, evaluate, and what each checkpoint of the warm start gains.

Each step is a function of the library; `run` is what a program of your own would look like. The rest is a cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdecode.calibration.calibrate import calibrate
from svdecode.common.figures import load_pyplot
from svdecode.common.files import check_writable, to_json, write_atomically
from svdecode.data.examples import read_examples
from svdecode.data.splits import FILE_NAME, Splits, data_hash
from svdecode.decoding.answers import first_line
from svdecode.demo.curves import direction_curves
from svdecode.demo.facts import country_facts
from svdecode.demo.figure import plot_demo
from svdecode.demo.speed import tokens_per_second
from svdecode.evaluation.report import Report
from svdecode.evaluation.run import evaluate
from svdecode.evaluation.steps import best_way, checkpoints, evaluate_steps, held_out_change
from svdecode.models.base_model import base_name, load_base
from svdecode.models.loading import BUNDLED_NAME, load_adapter, load_another
from svdecode.models.steer import steer
from svdecode.strength.calibration import FILE_NAME as CALIBRATION_NAME
from svdecode.strength.calibration import Calibration
from svdecode.warmstart.folder import is_complete
from svdecode.warmstart.train import warmstart

LEARNING_RATE, BATCH_SIZE = 2e-4, 4
CHECKPOINTS = (12, 24, 48)  # of the 48 steps that the questions about countries give
EVALUATION_BATCH, NEW_TOKENS = 16, 12
CACHE_NAME, CACHE_FORMAT = "demo-cache.json", 2
SYSTEMS = {"pre-trained": "pre-trained", "warm start": "warm start", "SVDecode (exact)": "SVDecode"}
"""The compared systems, and what the report calls them."""


def run(
    *,
    model: str | None = None,
    adapter: Path | None = None,
    data: Path | None = None,
    output: Path,
    seed: int = 0,
    progress: bool = True,
    show: Callable[[dict[str, object]], None] = lambda report: None,
) -> dict[str, object]:
    """Compare pre-trained model, warm start and SVDecode on questions that neither training nor calibration saw.

    Args:
        model: folder or hub name; None for the bundled SmolLM2-135M-Instruct.
        adapter: a warm start of your own, which keeps its parts where it split the same rows; None makes one in `output`, or
            takes it from there where it was made the same way.
        data: rows as `svdecode.data.examples.read_examples` reads them, split 60/20/20 so that equal prompts stay in one
            part; None for facts about countries.
        output: folder for the adapter, demo.json and demo.png.
        seed: of the parts, of the warm start and of the bootstrap.
        progress: show bars on stderr.
        show: gets the report before it is written, so that a disk that is full by then does not lose it.

    Returns:
        The report, as in demo.json.

    Raises:
        ValueError: unusable data, model, adapter or output.
    """
    load_pyplot()
    check_writable(output)
    rows, seconds, folder = None, {}, output / "adapter" if adapter is None else adapter
    if data is not None:
        rows = read_examples(data)
        splits = Splits.make(rows, data=data, seed=seed)
    with _timed(seconds, "load"):
        base, tokenizer = load_base(model, adapter)
    if rows is None:
        rows, splits = country_facts(seed, tokenizer, bundled=base_name(model, adapter) == BUNDLED_NAME)
    splits = _recorded_splits(adapter, rows) or splits
    calibration_rows, test_rows = (splits.select(rows, part) for part in ("calibration", "test"))
    cache = _Cache(output / "adapter" / CACHE_NAME, model, rows, splits)
    shared = {"batch_size": EVALUATION_BATCH, "seed": seed, "progress": progress}

    with _timed(seconds, "warm start"):
        if adapter is not None or (is_complete(folder) and cache.holds("adapter")):
            adapted = load_adapter(base, folder)
        else:
            adapted = _trained(base, tokenizer, rows, splits, folder, seed, progress)
            cache.keep("adapter", True)
    kept = cache.calibration(folder) if adapter is None else None
    with _timed(seconds, "calibrate"):
        if kept is not None:
            calibration = kept
        else:
            calibration = calibrate(adapted, calibration_rows, tokenizer=tokenizer, held_out=test_rows, **shared)
            if adapter is None:
                calibration.save_pretrained(folder)
    compared = {"mu": calibration, "estimators": ["exact"], "ablations": False, **shared}
    with _timed(seconds, "NLL"):
        nll = evaluate("nll", test_rows, adapted, tokenizer, **compared) if kept is None else None
    with _timed(seconds, "answers"):
        answers = evaluate("exact_match", test_rows, adapted, tokenizer, max_new_tokens=NEW_TOKENS, **compared)
    with _timed(seconds, "speed"):
        prompt = tokenizer(test_rows[0]["prompt"], return_tensors="pt").input_ids.to(adapted.device)
        speeds = tokens_per_second(adapted, steer(adapted, mu=calibration), prompt)
    with _timed(seconds, "curves"):
        curves = cache.values.get("curves") if adapter is None else None
        if curves is None:
            curves = direction_curves(adapted, test_rows, calibration, tokenizer, EVALUATION_BATCH, progress)
            if adapter is None:
                cache.keep("curves", curves)
    with _timed(seconds, "steps"):
        if adapter is None and not cache.holds("steps"):
            load = functools.partial(load_another, adapted)
            # The last checkpoint is the adapter itself.
            known = {} if nll is None else {checkpoints(folder)[-1]: (calibration, nll)}
            found = evaluate_steps(
                "nll", test_rows, folder, load, tokenizer, calibration_data=calibration_rows,
                known=known, **shared,
            )  # fmt: skip
            cache.keep("steps", found)
        steps = [] if adapter is not None else cache.values["steps"]
    means = cache.values["calibrated"]["nll"] if nll is None else _means(nll, "NLL")
    if adapter is None and kept is None:
        cache.keep("calibrated", {"sha256": _calibration_digest(folder), "nll": means})

    report = {
        "model": base_name(model, adapter),
        "examples": splits.sizes,
        "mu": calibration.mu,
        "estimates": calibration.estimates,
        "coverage": calibration.coverage,
        "held_out": held_out_change(calibration),
        **best_way(calibration),
        "table": calibration.table,
        "recommendation": calibration.recommendation,
        "curves": curves,
        "nll_all_tokens": means,
        "exact_match": _means(answers, "exact match"),
        "exact_match_difference": answers.comparisons["exact match"]["SVDecode (exact)"],
        **_samples(answers),
        "tokens_per_second": speeds,
        "steps": steps,
        "seconds": seconds,
        "figure": str(output / "demo.png"),
    }
    show(report)
    plot_demo(report, output / "demo.png")
    write_atomically(output / "demo.json", to_json(report, indent=2).encode())
    return report


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def _recorded_splits(adapter: Path | None, rows: list[dict[str, str]]) -> Splits | None:
    """The parts that a given adapter's warm start made of the same rows, so that no test question was trained on."""
    if adapter is None or not (adapter / FILE_NAME).is_file():
        return None
    found = Splits.load(adapter)
    same = found.data_sha256 == data_hash(rows)
    return found if same and found.parts["calibration"] and found.parts["test"] else None


def _trained(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    splits: Splits,
    folder: Path,
    seed: int,
    progress: bool,
) -> PeftModel:
    """One epoch over the training part, with a checkpoint after each of CHECKPOINTS and after the last step."""
    last = -(-splits.sizes["train"] // BATCH_SIZE)
    return warmstart(
        base,
        tokenizer,
        rows,
        folder,
        splits=splits,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        save_steps=[*(step for step in CHECKPOINTS if step < last), last],
        seed=seed,
        progress=progress,
    )


class _Cache:
    """What an earlier run with the same model, data and settings left: adapter, strength, curves, checkpoints' gains."""

    def __init__(self, path: Path, model: str | None, rows: list[dict[str, str]], splits: Splits) -> None:
        settings = (CACHE_FORMAT, model, rows, splits.parts, splits.seed, LEARNING_RATE, BATCH_SIZE, CHECKPOINTS)
        self.path, key = path, hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.values = found if found.get("key") == key else {"key": key}

    def calibration(self, folder: Path) -> Calibration | None:
        """That of the adapter, where its file is still the one that a whole run wrote; its NLL is then known too."""
        same = self.holds("calibrated") and self.values["calibrated"]["sha256"] == _calibration_digest(folder)
        return Calibration.from_pretrained(folder) if same else None

    def holds(self, name: str) -> bool:
        return name in self.values

    def keep(self, name: str, value: object) -> None:
        self.values[name] = value
        write_atomically(self.path, to_json(self.values, indent=1).encode())


def _calibration_digest(folder: Path) -> str | None:
    """SHA-256 of the calibration's file beside an adapter, which names the file of its tokens; None without one."""
    path = folder / CALIBRATION_NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _means(report: Report, metric: str) -> dict[str, dict]:
    """{"mean", "interval", "questions"} of each system."""
    return {short: report.results[metric][name] for name, short in SYSTEMS.items()}


def _samples(report: Report) -> dict[str, object]:
    """How many answers differ between warm start and SVDecode, and three questions to look at, those that differ first."""
    rows = []
    for record in report.records:
        answers = {short: first_line(record["answers"][name]) for name, short in SYSTEMS.items()}
        rows.append({"prompt": record["question"], "gold": record["gold"], **answers})
    rows.sort(key=lambda row: row["warm start"] == row["SVDecode"])
    differ = sum(row["warm start"] != row["SVDecode"] for row in rows)
    return {"answers_that_differ": differ, "samples": rows[:3]}
