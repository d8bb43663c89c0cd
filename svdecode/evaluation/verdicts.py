"""Verdicts on generated answers: kept in a JSONL file, asked of a judge where they are missing, put into the records."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from svdecode.common.files import JsonLines
from svdecode.evaluation.judge import ASPECTS, INFORMATIVE, TRUE, Case, Judge, yes_or_no

FILE_NAME = "verdicts.jsonl"
BOTH = f"{TRUE} and {INFORMATIVE}"

Verdict = dict[str, "bool | None"]
Key = tuple[str, str]  # question, answer


def read_verdicts(path: Path, partial: bool = False) -> dict[Key, Verdict]:
    """A JSONL file of {"question", "answer", "true", "informative"}; the last two are true, false, "yes", "no" or null.

    Args:
        path: the file.
        partial: leave out a last line that was being written when a run was interrupted.

    Raises:
        ValueError: no such file, or a line that is not a verdict; it names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    file = JsonLines(path, 'needs "question", "answer", and "true", "informative" as true or false')
    found = {}
    for number, row in file.read(partial):
        try:
            found[row["question"], row["answer"]] = {aspect: _as_verdict(row[aspect]) for aspect in ASPECTS}
        except (KeyError, TypeError, ValueError):
            raise file.error(number) from None
    return found


def judge_records(
    records: list[dict],
    references: dict[int, dict[str, list[str]]],
    *,
    judge: Judge | None,
    known: dict[Key, Verdict],
    path: Path | None,
    progress: bool = True,
) -> dict[str, int]:
    """Put a value for every verdict into the records; the number of unjudged answers of each system.

    Args:
        records: one a question, with "question" and "answers" {system: text}; changed in place.
        references: by the records' index, the true and false answers that a judge is shown.
        judge: asked where `known` has no verdict; None for nobody.
        known: verdicts, such as `read_verdicts` returns.
        path: the judge's verdicts are appended here as they come, and those of an earlier run taken from here.
        progress: show a bar on stderr.
    """
    if path is not None and path.is_file():
        known = {**read_verdicts(path, partial=True), **known}
    if judge is not None:
        cases = {
            (record["question"], answer): Case(record["question"], answer, references[record["index"]])
            for record in records
            for answer in record["answers"].values()
        }
        missing = [case for key, case in cases.items() if not _complete(known.get(key, {}))]
        known = {**known, **_ask(judge, missing, known, path, progress)}
    for record in records:
        record["values"] = {
            name: _values(known.get((record["question"], answer), {})) for name, answer in record["answers"].items()
        }
    systems = list(records[0]["answers"])
    return {name: sum(record["values"][name][BOTH] is None for record in records) for name in systems}


def _ask(judge: Judge, cases: list[Case], known: dict[Key, Verdict], path: Path | None, progress: bool) -> dict:
    """The judge's verdicts, in the order of the cases; each is written as soon as it is there."""
    found: dict[Key, Verdict] = {}

    def decide(case: Case) -> Verdict:
        before = known.get((case.question, case.answer), {})
        return {a: judge.decide(case, a) if before.get(a) is None else before[a] for a in ASPECTS}

    if path is not None and cases:
        path.parent.mkdir(parents=True, exist_ok=True)
        JsonLines(path).drop_partial_line()
    with (
        ThreadPoolExecutor(judge.parallel) as pool,
        tqdm(total=len(cases), desc="judge", unit="answer", disable=not progress) as bar,
    ):
        try:
            for case, verdict in zip(cases, pool.map(decide, cases), strict=True):
                found[case.question, case.answer] = verdict
                bar.update()
                if path is not None:
                    row = {"question": case.question, "answer": case.answer, **verdict}
                    JsonLines(path).append([row])
        except ValueError:  # the endpoint refuses: the questions still waiting would be refused too
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _values(verdict: Verdict) -> dict[str, float | None]:
    """A value for each metric; None where it is undecided."""
    values = {aspect: None if verdict.get(aspect) is None else float(verdict[aspect]) for aspect in ASPECTS}
    both = None if None in values.values() else values[TRUE] * values[INFORMATIVE]
    return {**values, BOTH: both}


def _complete(verdict: Verdict) -> bool:
    return all(verdict.get(aspect) is not None for aspect in ASPECTS)


def _as_verdict(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    decided = yes_or_no(value) if isinstance(value, str) else None
    if decided is None:
        raise ValueError("neither yes nor no")
    return decided
