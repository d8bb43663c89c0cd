"""Rows of data out of a table, JSON or text file, a Hugging Face data set or a built-in task (`benchmarks.py`)."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from svdecode.common.text import first_line
from svdecode.data import packed
from svdecode.data.benchmarks import BENCHMARKS, TEST, TRAIN
from svdecode.data.conversations import Row

SPLITS = {TRAIN: ("train",), TEST: ("test", "validation")}
"""Which split of a named data set is taken for a purpose, the first that is there, where the name does not say."""

_TABLES = {".csv": ("CSV", ","), ".tsv": ("TSV", "\t")}
_JSON = (".json", ".jsonl", ".ndjson")
_ICONV = {"UTF-16": "UTF-16", "Latin-1": "ISO-8859-1"}

_FILE_SUFFIXES = (*_JSON, *_TABLES, ".txt", *packed.SUFFIXES)
_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.\[\]:%+-]+))?")
_BUILT_IN = re.compile(rf"(?P<task>{'|'.join(BENCHMARKS)})(:(?P<split>[\w.\[\]:%+-]+))?")


def read_rows(data: object, purpose: str = TEST) -> list[dict[str, object]]:
    """Non-empty rows with normalised column names (lower case, underscores).

    Args:
        data: rows, a Dataset, or what `numbered_rows` takes.
        purpose: as in `numbered_rows`.

    Raises:
        ValueError: what `numbered_rows` raises, no rows, or a row that is no object.
    """
    if isinstance(data, str | Path):
        name, rows = str(data), list(numbered_rows(data, purpose))
    elif isinstance(data, Iterable) and not isinstance(data, Mapping):
        name, rows = "data", [(f"row {number}", _normalised(row)) for number, row in enumerate(data, 1)]
    else:
        raise TypeError(f"data must be a path, a name or rows, got {type(data).__name__}")
    if not rows:
        raise ValueError(f"{name} is empty")
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, {place}: an object with columns is needed, got {row!r:.60}")
    return [row if isinstance(row, Row) else Row(row, f"{name}, {place}") for place, row in rows]


def numbered_rows(source: str | Path, purpose: str = TEST) -> Iterator[tuple[str, object]]:
    """Rows with their places, for messages; the column names of those that are objects are normalised.

    Args:
        source: a .csv or .tsv file with a header line; a .json, .jsonl or .ndjson file (one list, or an object per line);
            another file of text, which is one row {"text"}; one of these compressed (.gz, .bz2, .xz, .zst, .zip); a Parquet
            or Arrow file; a data set's name, "owner/name", "owner/name:config" or
            "owner/name:config:split"; a built-in task's, "arc_easy" or "arc_easy:validation". No code of a data set is run.
        purpose: TRAIN or TEST, which split of a named data set to take.

    Raises:
        ValueError: names the file and the line (in a JSON list the number of the item) that is wrong.
        ImportError: a name without the package datasets.
    """
    path, text = Path(source), str(source)
    if path.is_file():
        rows = _rows_of_file(path)
    elif found := _BUILT_IN.fullmatch(text):
        benchmark = BENCHMARKS[found["task"]]
        split = found["split"] or benchmark.split(purpose)
        rows = benchmark.rows(_rows_of_data_set(text, benchmark.name, benchmark.config, split, ()))
    elif path.exists() or path.suffix.lower() in _FILE_SUFFIXES or not (found := _NAME.fullmatch(text)):
        raise ValueError(f"{source} is not a file")
    else:
        rows = _rows_of_data_set(text, found["name"], found["config"], found["split"], SPLITS[purpose])
    for place, row in rows:
        yield place, _normalised(row)


def _normalised(row: object) -> object:
    if not isinstance(row, Mapping):
        return row
    found = {normalised_name(column): value for column, value in row.items()}
    return Row(found, row.place, row.turns) if isinstance(row, Row) else found


def normalised_name(column: object) -> str:
    """A column's name in lower case, with underscores for spaces."""
    return str(column).strip().lower().replace(" ", "_")


def _rows_of_file(path: Path) -> Iterator[tuple[str, object]]:
    try:
        content, suffix = packed.unpacked(path, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if packed.is_table(content):
        return packed.table_rows(path, content)
    text = _text_of(path, content)
    if suffix in _TABLES:
        return _table_rows(path, text, *_TABLES[suffix])
    if suffix in _JSON:
        return _json_items(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    return iter([("text", {"text": text})] if text.strip() else [])


def _text_of(path: Path, content: bytes) -> str:
    """The text of a UTF-8 file; ValueError says what another file is and how to convert it."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        other = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "Latin-1"
        raise ValueError(
            f"{path} cannot be read: line {line} has byte 0x{byte:02x}, which is not UTF-8 (is the file {other}?): "
            f"convert it, for example with: iconv -f {_ICONV[other]} -t utf-8 {path} > utf8-{path.name}"
        ) from None


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


def _table_rows(path: Path, text: str, kind: str, delimiter: str) -> Iterator[tuple[str, object]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1  # of the row, which may go over several lines
    try:
        for cells in reader:
            if cells and header is None:
                header = cells
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(f"{path}, line {start}: {len(cells)} cells under {len(header)} columns")
                yield f"line {start}", dict(zip(header, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not {kind} ({error})") from None


def _rows_of_data_set(
    source: str, name: str, config: str | None, split: str | None, preferred: tuple[str, ...]
) -> Iterator[tuple[str, object]]:
    try:
        import datasets
        from huggingface_hub.utils import logging
    except ImportError:
        raise ImportError(f"{source} is not a file; data sets need datasets: pip install 'svdecode[train]'") from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the hub's own lines on each retry
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source} is not a file, and no data set of this name can be loaded: {first_line(error)}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    if split is None:
        chosen = next((s for s in preferred if s in found), None)
        if chosen is None:
            raise ValueError(f"{source}: which split? Write {name}:{config or ''}:SPLIT with one of {', '.join(found)}")
        found = found[chosen]
    return ((f"row {number}", row) for number, row in enumerate(found, 1))
