"""Prompts and completions: out of rows of several layouts, and as tensors with labels on the completion only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svdecode.data.benchmarks import TRAIN
from svdecode.data.sources import numbered_rows

COLUMNS = ("prompt", "completion")


def instruction_prompt(row: Mapping[str, str]) -> str:
    """The prompt of an LLM-Adapters row: the instruction, the input where there is one, each with a line break after it."""
    return "".join(f"{text}\n" for text in (row["instruction"], row.get("input")) if text)


def question_prompt(question: str) -> str:
    """The prompt of a TruthfulQA question."""
    return f"Q: {question}\nA:"


# What a row with these columns means as (prompt, completion); the first layout that fits is taken.
LAYOUTS: dict[tuple[str, str], Callable[[Mapping[str, str]], tuple[str, str]]] = {
    COLUMNS: lambda row: (row["prompt"], row["completion"]),
    ("instruction", "output"): lambda row: (instruction_prompt(row), row["output"]),  # LLM-Adapters, Alpaca
    ("question", "best_answer"): lambda row: (question_prompt(row["question"]), f" {row['best_answer'].strip()}"),
}
_LAYOUT_NAMES = ", ".join(" and ".join(columns) for columns in LAYOUTS)


def check_examples(examples: Any) -> list[dict[str, str]]:
    """A non-empty list of {"prompt", "completion"} from a list or a Dataset with those columns; ValueError otherwise."""
    columns = getattr(examples, "column_names", None)
    if columns is not None and not set(COLUMNS) <= set(columns):
        raise ValueError(f"data needs the columns {' and '.join(COLUMNS)}, got {', '.join(columns) or 'none'}")
    rows = list(examples)
    if not rows:
        raise ValueError("data is empty")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(row.get(column), str) for column in COLUMNS):
            raise ValueError(f"data[{index}] must be a mapping with the texts {' and '.join(COLUMNS)}, got {row!r:.80}")
    return rows


def read_examples(source: str | Path, purpose: str = TRAIN) -> list[dict[str, str]]:
    """Examples {"prompt", "completion"} from a file or a data set, whose layout is found by its columns.

    | columns (upper case and spaces do not matter) | prompt | completion |
    |---|---|---|
    | prompt, completion | as it is | as it is |
    | instruction, output (LLM-Adapters) | instruction, a line break, and input with another where there is one | output |
    | question, best answer (TruthfulQA) | "Q: ", the question, a line break, "A:" | a space and the answer |

    Args:
        source: a file, a Hugging Face data set's name or a built-in task's (`svdecode.data.sources.numbered_rows`).
        purpose: which split of a named data set to take, "train" or "test".

    Raises:
        ValueError: names the file and the line (in a JSON list the number of the item) that is wrong.
        ImportError: a data set's name without the package datasets.
    """
    examples, layout = [], None
    for place, row in numbered_rows(source, purpose):
        layout = layout or _layout(source, place, row)
        examples.append(_example(source, place, row, layout))
    if not examples:
        raise ValueError(f"{source}: data is empty")
    return examples


def _layout(source: str | Path, place: str, row: object) -> tuple[str, str]:
    columns = list(row) if isinstance(row, Mapping) else []
    for layout in LAYOUTS:
        if set(layout) <= set(columns):
            return layout
    found = ", ".join(map(str, columns)) or "none"
    raise ValueError(f"{source}, {place}: data needs the columns {_LAYOUT_NAMES}, got {found:.200}")


def _example(source: str | Path, place: str, row: object, layout: tuple[str, str]) -> dict[str, str]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{source}, {place}: an object with {' and '.join(layout)} is needed, got {row!r:.80}")
    for column in layout:
        if not isinstance(row.get(column), str):
            raise ValueError(f"{source}, {place}: {column} must be a text, got {row.get(column)!r:.80}")
    return dict(zip(COLUMNS, LAYOUTS[layout](row), strict=True))


def examples_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]] | None:
    """The examples that rows with normalised column names hold; None where they do not share a known layout."""
    for columns, texts in LAYOUTS.items():
        if all(isinstance(row.get(column), str) for row in rows for column in columns):
            return [dict(zip(COLUMNS, texts(row), strict=True)) for row in rows]
    return None
