"""Rows of evaluation data: a CSV, JSON, JSONL or text file, or a Hugging Face dataset by name."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

SPLITS = ("test", "validation")
"""Which split of a named dataset is taken, the first that is there, where the name does not say."""


def read_rows(data: object) -> list[dict[str, object]]:
    """Non-empty rows with normalised column names (lower case, underscores).

    Args:
        data: rows, a Dataset, the path of a .csv, .json (a list), .jsonl or text file (one row, {"text"}), or the name of a
            Hugging Face dataset, NAME[:CONFIG][:SPLIT].

    Raises:
        ValueError: no such file or dataset, a broken file, or no rows; it names the file and the line.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        rows = _read_file(path) if path.is_file() else _load_named(str(data))
    elif isinstance(data, Iterable) and not isinstance(data, Mapping):
        rows = list(data)
    else:
        raise TypeError(f"data must be a path, a name or rows, got {type(data).__name__}")
    if not rows:
        raise ValueError(f"{_name(data)} is empty")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{_name(data)}: row {number} must be an object with columns, got {row!r:.60}")
    return [{str(key).strip().lower().replace(" ", "_"): value for key, value in row.items()} for row in rows]


def need_columns(rows: list[dict[str, object]], columns: Iterable[str], task: str) -> None:
    """ValueError that names the first row without a non-empty value in one of the columns."""
    for number, row in enumerate(rows, 1):
        missing = [name for name in columns if not _filled(row.get(name))]
        if missing:
            found = ", ".join(name for name in row if name) or "none"
            raise ValueError(f"data for {task}, row {number}: no {missing[0]!r} (columns: {found})")


def digest(rows: object) -> str:
    """SHA-256 of rows, which names them in the header of a run."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def _filled(value: object) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list | tuple) and len(value) > 0


def _name(data: object) -> str:
    return str(data) if isinstance(data, str | Path) else "data"


def _read_file(path: Path) -> list[object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    kind = path.suffix.lower()
    if kind == ".csv":
        return _read_csv(path, text)
    if kind == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path} must be a JSON list of objects")
        return rows
    if kind == ".jsonl":
        return _read_lines(path, text)
    return [{"text": text}] if text.strip() else []


def _read_csv(path: Path, text: str) -> list[object]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {number}: not as many values as columns")
    return rows


def _read_lines(path: Path, text: str) -> list[object]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    return rows


def _load_named(name: str) -> list[object]:
    if Path(name).suffix or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name} is not a file")
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{name} is not a file; as a dataset name it needs: pip install 'svdecode[train]'") from None
    repository, config, split = (*name.split(":", 2), "", "")[:3]
    try:
        found = datasets.load_dataset(repository, config or None)
    except Exception as error:  # the hub client raises a dozen kinds; all mean the same to the user
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{name} is neither a file nor a dataset that can be loaded here: {first}") from None
    chosen = split or next((s for s in SPLITS if s in found), next(iter(found)))
    if chosen not in found:
        raise ValueError(f"{name}: no split {chosen!r}, there are {', '.join(found)}")
    return list(found[chosen])
