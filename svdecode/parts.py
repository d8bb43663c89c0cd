"""Which rows of a data set an evaluation may use: those that the warm start set aside, where it recorded its splits."""

from __future__ import annotations

import sys
from pathlib import Path

from svdecode import distributed
from svdecode.data import examples_of
from svdecode.splits import FILE_NAME, Splits, data_hash, example_hash

ALL = "all"


def part_of(rows: list[dict], folder: Path | None, part: str, wanted: str | None = None) -> list[dict]:
    """The rows of one part of data that were split before the warm start; all of other data.

    Args:
        rows: with normalised column names (`svdecode.sources.read_rows`).
        folder: of the adapter, where its splits are recorded; None for no adapter.
        part: "calibration" or "test", taken where the data are those that were split and the part is not empty.
        wanted: a part that must be taken (ValueError where it cannot be), or "all" for every row.

    A word on stderr says how many rows the warm start was trained on, if any.
    """
    if wanted == ALL or folder is None or (wanted is None and not (folder / FILE_NAME).is_file()):
        return rows
    splits, examples = Splits.load(folder), examples_of(rows)
    if wanted is None and (examples is None or data_hash(examples) != splits.data_sha256 or not splits.parts.get(part)):
        seen = 0 if examples is None else splits.seen_in_training(examples)
        if seen and distributed.is_main():
            print(
                f"svdecode: the warm start was trained on {seen} of these {len(rows)} rows: "
                "what they show says little about others",
                file=sys.stderr,
            )
        return rows
    if examples is None:
        raise ValueError(f"--split {wanted} needs rows with the columns of a warm start")
    chosen = {example_hash(example) for example in splits.select(examples, wanted or part)}
    return [row for row, example in zip(rows, examples, strict=True) if example_hash(example) in chosen]
