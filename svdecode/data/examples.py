"""Prompts and completions: out of rows of several layouts, and as tensors with labels on the completion only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svdecode.data.benchmarks import TRAIN
from svdecode.data.conversations import CHAT_COLUMNS, Row, conversation, is_conversation
from svdecode.data.sources import normalised_name, numbered_rows

Columns = tuple[str, str]
COLUMNS: Columns = ("prompt", "completion")


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
    ("question", "answer"): lambda row: (question_prompt(row["question"]), f" {row['answer'].strip()}"),
}
_LAYOUT_NAMES = ", ".join([*(" and ".join(columns) for columns in LAYOUTS), *CHAT_COLUMNS])


def check_examples(examples: Any) -> list[dict[str, Any]]:
    """A non-empty list of {"prompt", "completion"} from a list or a Dataset with those columns; ValueError otherwise.

    Conversations, in any layout of `svdecode.data.conversations.conversation`, are brought into one.
    """
    columns = getattr(examples, "column_names", None)
    if columns is not None and not set(COLUMNS) <= set(columns) and not set(CHAT_COLUMNS) & set(columns):
        raise ValueError(f"data needs the columns {' and '.join(COLUMNS)}, got {', '.join(columns) or 'none'}")
    rows = list(examples)
    if not rows:
        raise ValueError("data is empty")
    for index, row in enumerate(rows):
        if is_conversation(row):
            rows[index] = conversation(row, place=f"data[{index}]")
        elif not isinstance(row, Mapping) or not all(isinstance(row.get(column), str) for column in COLUMNS):
            raise ValueError(f"data[{index}] must be a mapping with the texts {' and '.join(COLUMNS)}, got {row!r:.80}")
    return rows


def read_examples(
    source: str | Path, purpose: str = TRAIN, *, columns: Columns = COLUMNS, turns: str | None = None
) -> list[dict[str, Any]]:
    """Examples {"prompt", "completion"} from a file or a data set, whose layout is found by its columns.

    | columns (upper case and spaces do not matter) | prompt | completion |
    |---|---|---|
    | prompt, completion | as it is | as it is |
    | instruction, output (LLM-Adapters) | instruction, a line break, and input with another where there is one | output |
    | question, best answer (TruthfulQA) | "Q: ", the question, a line break, "A:" | a space and the answer |
    | question, answer | as TruthfulQA's | as TruthfulQA's |
    | messages; conversations; prompt, completion as lists | messages (`svdecode.data.conversations.conversation`) | messages |

    Args:
        source: a file, a Hugging Face data set's name or a built-in task's (`svdecode.data.sources.numbered_rows`).
        purpose: which split of a named data set to take, "train" or "test".
        columns: names of the columns that are prompt and completion.
        turns: "all" or "last", which assistant turns of a conversation carry the loss; None is "all".

    Raises:
        ValueError: names the file and the line (in a JSON list the number of the item) that is wrong.
        ImportError: a data set's name without the package datasets.
    """
    examples, layout = [], None
    for place, row in numbered_rows(source, purpose):
        row = renamed(row, columns, f"{source}, {place}")
        if is_conversation(row):
            examples.append(conversation(row, turns, f"{source}, {place}"))
            continue
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


def renamed(row: Any, columns: Columns, place: str) -> Any:
    """A row whose prompt and completion are in columns of these names; ValueError where it lacks one of them.

    Args:
        row: with normalised column names.
        columns: names of prompt and completion; `COLUMNS` leaves the row as it is.
        place: file and line, for messages and for the new row.
    """
    names = tuple(normalised_name(name) for name in columns)
    if names == COLUMNS or not isinstance(row, Mapping):
        return row
    for name in names:
        if name not in row:
            raise ValueError(f"{place}: no column {name!r} (columns: {', '.join(map(str, row))})"[:300])
    others = {name: value for name, value in row.items() if name not in CHAT_COLUMNS}
    return Row({**others, **dict(zip(COLUMNS, (row[name] for name in names), strict=True))}, place)


def examples_of(rows: Sequence[Mapping[str, Any]], turns: str | None = None) -> list[dict[str, Any]] | None:
    """The examples that rows with normalised column names hold; None where they do not share a known layout.

    `turns` is for conversations, as in `read_examples`.
    """
    if rows and all(is_conversation(row) for row in rows):
        return [conversation(row, turns, f"row {number}") for number, row in enumerate(rows, 1)]
    for columns, texts in LAYOUTS.items():
        if all(isinstance(row.get(column), str) for row in rows for column in columns):
            return [dict(zip(COLUMNS, texts(row), strict=True)) for row in rows]
    return None
