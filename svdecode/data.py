"""Prompts and completions: out of files and data sets of several layouts, and as batches with labels on the completion only."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from svdecode.constants import IGNORE_INDEX

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
    ("Question", "Best Answer"): lambda row: (question_prompt(row["Question"]), f" {row['Best Answer'].strip()}"),
    ("question", "best_answer"): lambda row: (question_prompt(row["question"]), f" {row['best_answer'].strip()}"),
}
_LAYOUT_NAMES = ", ".join(" and ".join(columns) for columns in LAYOUTS)
_FILE_SUFFIXES = (".json", ".jsonl", ".csv")
_DATASET_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.\[\]:%+-]+))?")


def check_examples(examples: object) -> list[dict[str, str]]:
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


def read_examples(source: str | Path) -> list[dict[str, str]]:
    """Examples {"prompt", "completion"} from a file or a Hugging Face data set, whose layout is found by its columns.

    | columns | prompt | completion |
    |---|---|---|
    | prompt, completion | as it is | as it is |
    | instruction, output (LLM-Adapters) | instruction, a line break, and input with another where there is one | output |
    | Question, Best Answer (TruthfulQA) | "Q: ", the question, a line break, "A:" | a space and the answer |

    Args:
        source: a .jsonl or .json file (an object a line, or one list of objects), a .csv file with a header line, or a data
            set's name, "owner/name", "owner/name:config" or "owner/name:config:split" (left out: its "train" split). No code
            of a data set is run.

    Raises:
        ValueError: names the file and the line (in a JSON list the number of the item) that is wrong.
        ImportError: a data set's name without the package datasets.
    """
    path = Path(source)
    name = _DATASET_NAME.fullmatch(str(source))
    try:
        if path.is_file():
            rows = _rows_of_file(path)
        elif path.exists() or name is None or path.suffix in _FILE_SUFFIXES:
            raise ValueError(f"{source} is not a file")
        else:
            rows = _rows_of_dataset(str(source), **name.groupdict())
        examples, layout = [], None
        for place, row in rows:
            layout = layout or _layout(source, place, row)
            examples.append(_example(source, place, row, layout))
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from None
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


def _rows_of_file(path: Path) -> Iterator[tuple[str, object]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        return _csv_rows(path, text)
    return _json_items(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, object]]:
    # Not splitlines(): a JSON text may hold U+2028 and other line ends of Unicode as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})") from None


def _json_items(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    for number, item in enumerate(items, 1):
        yield f"item {number}", item


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    start = 1  # of the row, which may go over several lines
    try:
        for cells in reader:
            if cells and header is None:
                header = cells
                _layout(path, "line 1", dict.fromkeys(header))
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(f"{path}, line {start}: {len(cells)} cells under {len(header)} columns")
                yield f"line {start}", dict(zip(header, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not CSV ({error})") from None


def _rows_of_dataset(
    source: str, name: str, config: str | None = None, split: str | None = None
) -> Iterator[tuple[str, object]]:
    try:
        import datasets
        from huggingface_hub.utils import logging
    except ImportError:
        raise ImportError(f"{source} is not a file; data sets need datasets: pip install 'svdecode[train]'") from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the hub's own lines on each retry
    try:
        found = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{source} is not a file, and no data set of this name can be loaded: {first}") from None
    finally:
        logging.set_verbosity(verbosity)
    return ((f"row {number}", row) for number, row in enumerate(found, 1))


def encode(example: Mapping[str, str], tokenizer: object, max_length: int | None = None) -> dict[str, list[int]]:
    """Token ids of prompt + completion + end-of-sequence, and labels that ignore the prompt."""
    prompt = tokenizer(example["prompt"]).input_ids
    completion = tokenizer(example["completion"], add_special_tokens=False).input_ids
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    ids = (prompt + completion)[:max_length]
    labels = ([IGNORE_INDEX] * len(prompt) + completion)[:max_length]
    return {"input_ids": ids, "labels": labels}


def collate(encoded: Iterable[Mapping[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A right-padded batch: input_ids, attention_mask, labels, each (B, T) int64."""
    encoded = list(encoded)
    width = max(len(row["input_ids"]) for row in encoded)

    def padded(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in encoded])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in encoded])
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": padded("labels", IGNORE_INDEX)}


def pad_token_id(tokenizer: object) -> int:
    """The tokenizer's pad token, or its end-of-sequence token, or 0: padded positions are masked anyway."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def batches(data: object, tokenizer: object | None, batch_size: int) -> tuple[Iterator[dict[str, Tensor]], int | None]:
    """Batches with input_ids, attention_mask and labels, and their number where it is known.

    Args:
        data: a list of {"prompt", "completion"}, a Dataset with those columns, or an iterable of such batches.
        tokenizer: needed for texts.
        batch_size: of texts; ready batches keep theirs.
    """
    if isinstance(data, list) or hasattr(data, "column_names"):
        is_batch = isinstance(data, list) and data and isinstance(data[0], Mapping) and "input_ids" in data[0]
        if not is_batch:
            examples = check_examples(data)
            if tokenizer is None:
                raise ValueError("tokenizer is needed where data are texts")
            encoded = [encode(example, tokenizer) for example in examples]
            # Neighbours of like length waste little padding; the result does not depend on the order.
            encoded.sort(key=lambda row: len(row["input_ids"]))
            chunks = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
            return (collate(chunk, pad_token_id(tokenizer)) for chunk in chunks), len(chunks)
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"data must be a list of texts, a Dataset or an iterable of batches, got {type(data).__name__}")
    return _checked(data), len(data) if hasattr(data, "__len__") else None


def _checked(data: Iterable[object]) -> Iterator[dict[str, Tensor]]:
    for index, batch in enumerate(data):
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            raise ValueError(f"batch {index} of data needs input_ids and labels (and attention_mask)")
        yield dict(batch)
