"""`Report`: what an evaluation found, as data, as Markdown and as text for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from svdecode.common.tables import markdown_table, with_interval
from svdecode.evaluation.comparison import NOT_KNOWN, difference, summary
from svdecode.evaluation.tasks.base import Metric, Task

SAME_ANSWER = 0.9
"""From this share on, a system that gives one answer to so many questions is named in the report."""


@dataclass
class Report:
    """Figures of every system on the same questions."""

    task: str
    model: str
    questions: int
    """How many; of these `unjudged` count answers without a verdict."""
    systems: dict[str, dict[str, object]]
    """Settings of each system: mu, alpha, penalty, direction; all None for the pre-trained model."""
    results: dict[str, dict[str, dict]]
    """metric -> system -> {"mean", "interval", "questions"}."""
    comparisons: dict[str, dict[str, dict]]
    """metric -> system -> {"difference", "interval", "verdict", "mcnemar_p", ...} to the baseline on the same questions."""
    baseline: str | None
    notes: list[str] = field(default_factory=list)
    usual_answers: dict[str, dict[str, object]] = field(default_factory=dict)
    """The answer that each system gives most often, {"answer", "share"}: a label given to all questions is no knowledge."""
    cautions: list[dict[str, str]] = field(default_factory=list)
    """What the strength or the data cannot show, {"code", "text"} each: see `svdecode.strength.cautions`."""
    unjudged: dict[str, int] = field(default_factory=dict)
    """Answers of each system that got no verdict."""
    seconds: float = 0.0
    tokens: int = 0
    """Tokens that went through the models in this run; 0 where all was done before."""
    records: list[dict] = field(default_factory=list, repr=False)
    """One a question, as in records.jsonl."""

    def to_dict(self) -> dict[str, object]:
        """What `svdecode.common.files.to_json` writes: all but the records."""
        return {name: value for name, value in vars(self).items() if name != "records"}

    def markdown(self) -> str:
        """Tables of the figures and of the differences, and the notes."""
        parts = [f"# {self.task}, {self.model}, {self.questions} questions\n", markdown_table(*self.figures())]
        if self.comparisons:
            parts.append(f"Difference to {self.baseline} on the same questions:\n")
            parts.append(markdown_table(*self.differences()))
        return "\n".join([*parts, *(f"{note}\n" for note in self.sentences())])

    def figures(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the figures' table."""
        metrics = list(self.results)
        perplexity = metrics == ["NLL"]
        head = ["", "mu", *(f"{name} [95%]" for name in metrics), *(["perplexity"] if perplexity else [])]
        rows = []
        for name, settings in self.systems.items():
            cells = [with_interval(self.results[metric].get(name), "mean") for metric in metrics]
            if perplexity:
                cells.append(f"{math.exp(min(self.results['NLL'][name]['mean'], 700)):.2f}")
            mu = settings["mu"]
            rows.append([name, "" if mu is None else f"{mu:.4g}", *cells])
        return head, rows

    def differences(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table of differences to the baseline."""
        rows = []
        for metric, found in self.comparisons.items():
            for name, one in found.items():
                p = f"{one['mcnemar_p']:.3f}" if "mcnemar_p" in one else ""
                rows.append([metric, name, with_interval(one, "difference", sign="+"), p, one["verdict"]])
        return ["metric", "", "difference [95%]", "McNemar p", "verdict"], rows

    def sentences(self) -> list[str]:
        """What the numbers mean, and the notes."""
        found = []
        for metric, rows in self.comparisons.items():
            ours = {name: row for name, row in rows.items() if name.startswith("SVDecode")}
            for word, text in (("better", "improves"), ("worse", "worsens")):
                names = [name for name, row in ours.items() if row["verdict"] == word]
                if names:
                    found.append(f"{', '.join(names)} {text} {metric} against {self.baseline} beyond noise.")
            if any(row["verdict"] == NOT_KNOWN for row in ours.values()):
                found.append(f"{metric}: whether steering helps is not known: one question gives no interval.")
            silent = [name for name, row in ours.items() if row["verdict"] == "no gain is shown"]
            if silent:
                which = "every SVDecode strength" if len(silent) == len(ours) else ", ".join(silent)
                found.append(f"{metric}: no gain is shown for {which}: the interval of the difference contains 0.")
        same: dict[str, list[str]] = {}
        for name, usual in self.usual_answers.items():
            if usual["share"] >= SAME_ANSWER:
                same.setdefault(usual["answer"], []).append(f"{name} ({usual['share']:.0%})")
        for answer, names in same.items():
            found.append(
                f"Nearly all answers are {answer!r} for {', '.join(names)}: the figure is that answer's share among the right "
                "ones, and a difference between two such systems is no better or worse knowledge."
            )
        for name, count in self.unjudged.items():
            if count:
                found.append(f"{name}: {count} of {self.questions} answers are unjudged and left out of its figures.")
        return [*found, *(f"Caution: {one['text']}" for one in self.cautions), *self.notes]


def summarise(
    task: Task, records: list[dict], systems: dict[str, dict], baselines: dict[str, str], seed: int
) -> tuple[dict, dict]:
    """(results, comparisons) of the records' values.

    Args:
        task: whose metrics.
        records: one a question: {"values": {system: {metric: value or None}}, "weight"}.
        systems: their names, in order.
        baselines: for each system that is compared, the system it is compared with.
        seed: of the bootstrap.
    """
    results: dict = {}
    comparisons: dict = {}
    for metric in task.metrics:
        for name in systems:
            held = _held(records, metric, name)
            if held:
                results.setdefault(metric.name, {})[name] = summary(metric, *_tensors(held, name, metric), seed)
        for name, baseline in baselines.items():
            held = _held(_held(records, metric, name), metric, baseline)  # both have a value: a paired difference
            if held:
                values, weights = _tensors(held, name, metric)
                other, _ = _tensors(held, baseline, metric)
                comparisons.setdefault(metric.name, {})[name] = difference(metric, values, other, weights, seed)
    return results, comparisons


def usual_answers(records: list[dict], systems: list[str]) -> dict[str, dict[str, object]]:
    """{"answer", "share"} of what each system answers most often, the best choice or the generated text."""
    found = {}
    for name in systems:
        given = Counter(answer for record in records if (answer := _answer(record, name)) is not None)
        if given:
            answer, count = given.most_common(1)[0]
            found[name] = {"answer": answer, "share": count / given.total()}
    return found


def _answer(record: dict, system: str) -> str | None:
    if "choices" in record:
        logprobs = [float(v) for v in record["logprobs"][system]]  # read from a file, "-inf" is a text
        return record["choices"][logprobs.index(max(logprobs))].strip()
    return record.get("answers", {}).get(system)


def _held(records: list[dict], metric: Metric, system: str) -> list[dict]:
    return [r for r in records if r["values"].get(system, {}).get(metric.name) is not None]


def _tensors(records: list[dict], system: str, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    values = [record["values"][system][metric.name] for record in records]
    weights = [record.get("weight", 1.0) for record in records]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
