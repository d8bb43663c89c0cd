"""The calibration's files beside the adapter: svdecode.json, schema-versioned, and the token statistics as safetensors.

The JSON file is written last and names the hash of the other one: an interrupted run leaves the old calibration or the new one,
and a file of statistics that belongs to another calibration is not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from svdecode.common.files import read_object, to_json, write_atomically
from svdecode.strength.nll_curve import NLLCurve
from svdecode.strength.token_statistics import GoldTokens, TokenStatistics

FILE_NAME = "svdecode.json"
TOKENS_NAME = "svdecode.safetensors"
WHAT = "a calibration"
SCHEMA = 3
OLD_SCHEMAS = (1, 2)
"""1 had no intervals, gains, hash of the data, penalty and selection; both held each token's kept set, which is not read."""

_KINDS = {"gold": GoldTokens, "curve": NLLCurve}


def save(folder: Path, values: dict[str, object], parts: dict[str, TokenStatistics]) -> None:
    """Write the values, and the statistics by name."""
    from safetensors.torch import save as to_bytes

    values = {"schema": SCHEMA, **values}
    if parts:
        tensors = {
            f"{part}.{kind}.{entry.name}": getattr(getattr(tokens, kind), entry.name).clone()
            for part, tokens in parts.items()
            for kind, entries in _KINDS.items()
            for entry in fields(entries)
        }
        content = to_bytes(tensors)
        values["tokens_sha256"] = hashlib.sha256(content).hexdigest()
        write_atomically(folder / TOKENS_NAME, content)
    write_atomically(folder / FILE_NAME, to_json(values, indent=2).encode())


def load(folder: Path, kind: type, parts: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values and whichever of the parts are there.

    Args:
        folder: where the files lie.
        kind: a dataclass; what its fields are annotated with is what the values must be.
        parts: fields that are token statistics.

    Raises:
        ValueError: a file is damaged, of another schema, or lacks a value or has one of another type; it names the file.
    """
    path = folder / FILE_NAME
    values = read_object(path, WHAT)
    try:
        schema, digest = values.pop("schema", None), _text(values.pop("tokens_sha256", ""))
        if schema != SCHEMA and schema not in OLD_SCHEMAS:
            raise ValueError(f"schema {schema!r} is not {SCHEMA}")
        _check(values, kind, parts)
        tokens = folder / TOKENS_NAME
        content = tokens.read_bytes() if tokens.is_file() else None
        own = schema == SCHEMA and content is not None and hashlib.sha256(content).hexdigest() == digest
        return values, _statistics(content, parts) if own else {}
    except ValueError as error:
        raise ValueError(f"{path} is not {WHAT}: {error}") from None


def _check(values: dict[str, Any], kind: type, parts: tuple[str, ...]) -> None:
    """Put numbers in the place of "inf", "-inf" and "nan"; ValueError where a value is missing, unknown or of another type."""
    entries = {entry.name: entry for entry in fields(kind) if entry.name not in parts}
    unknown = sorted(set(values) - set(entries))
    if unknown:
        raise ValueError(f"{unknown[0][:40]!r} is unknown")
    for name, entry in entries.items():
        if name not in values:
            if entry.default is MISSING and entry.default_factory is MISSING:
                raise ValueError(f"{name} is missing")
            continue
        annotation, _, optional = str(entry.type).partition(" | ")
        if values[name] is None and optional:
            continue
        try:
            values[name] = _READ[annotation](values[name]) if annotation in _READ else values[name]
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None


def _number(value: Any) -> float:
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):  # as `svdecode.common.files.plain` writes them
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, got {to_json(value)[:40]}")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, got {to_json(value)[:40]}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a text, got {to_json(value)[:40]}")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"must be an object in braces, got {to_json(value)[:40]}")
    return value


def _numbers(value: Any) -> list[float]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list of numbers, got {to_json(value)[:40]}")
    return [_number(entry) for entry in value]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list, got {to_json(value)[:40]}")
    return value


def _each(read: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {name: read(entry) for name, entry in _object(value).items()}


_READ: dict[str, Callable[[Any], Any]] = {
    "float": _number,
    "int": _integer,
    "str": _text,
    "Direction": _text,
    "dict": _object,
    "list[float]": _numbers,
    "list[str]": _list,
    "list[dict]": _list,
    "list[dict[str, str]]": _list,
    "dict[str, float]": _each(_number),
    "dict[str, list[float]]": _each(_numbers),
    "dict[str, dict]": _each(_object),
}
"""By a field's annotation; a value with another annotation is taken as it is."""


def _statistics(content: bytes, parts: tuple[str, ...]) -> dict[str, TokenStatistics]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        found = from_bytes(content)
        there = [part for part in parts if f"{part}.gold.kl" in found]
        return {
            part: TokenStatistics(
                **{
                    kind: entries(**{entry.name: found[f"{part}.{kind}.{entry.name}"] for entry in fields(entries)})
                    for kind, entries in _KINDS.items()
                }
            )
            for part in there
        }
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{TOKENS_NAME} holds no token statistics ({error})") from None
