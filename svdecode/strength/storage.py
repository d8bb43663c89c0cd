"""The calibration's files beside the adapter: svdecode.json, schema-versioned, and the token statistics as safetensors.

The JSON file is written last and names the hash of the other one: an interrupted run leaves the old calibration or the new one,
and a file of statistics that belongs to another calibration is not read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from svdecode.common.files import to_json, write_atomically
from svdecode.strength.token_statistics import TokenStatistics

FILE_NAME = "svdecode.json"
TOKENS_NAME = "svdecode.safetensors"
SCHEMA = 2
OLD_SCHEMAS = (1,)  # 1 had no intervals, gains, hash of the data, penalty and selection

_NAMES = [entry.name for entry in fields(TokenStatistics)]


def save(folder: Path, values: dict[str, object], parts: dict[str, TokenStatistics]) -> None:
    """Write the values, and the statistics by name, "tokens" being the calibration's own."""
    from safetensors.torch import save as to_bytes

    values = {"schema": SCHEMA, **values}
    if parts:
        tensors = {
            _prefix(part) + name: getattr(tokens, name).contiguous()
            for part, tokens in parts.items()
            for name in _NAMES
        }
        content = to_bytes(tensors)
        values["tokens_sha256"] = hashlib.sha256(content).hexdigest()
        write_atomically(folder / TOKENS_NAME, content)
    write_atomically(folder / FILE_NAME, to_json(values, indent=2).encode())


def load(folder: Path, parts: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values and whichever of the parts are there; ValueError, KeyError or AttributeError where a file is damaged."""
    values = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    schema, digest = values.pop("schema"), values.pop("tokens_sha256", None)
    if schema != SCHEMA and schema not in OLD_SCHEMAS:
        raise ValueError(f"schema {schema} is not {SCHEMA}")
    path = folder / TOKENS_NAME
    if not path.is_file():
        return values, {}
    content = path.read_bytes()
    own = schema in OLD_SCHEMAS if digest is None else hashlib.sha256(content).hexdigest() == digest
    return values, _statistics(content, parts) if own else {}


def _statistics(content: bytes, parts: tuple[str, ...]) -> dict[str, TokenStatistics]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        found = from_bytes(content)
        found.setdefault("sequence", torch.full_like(found["num_kept"], -1))  # schema 1 did not know them
        there = [part for part in parts if _prefix(part) + "kl" in found]
        return {part: TokenStatistics(**{name: found[_prefix(part) + name] for name in _NAMES}) for part in there}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{TOKENS_NAME} holds no token statistics ({error})") from None


def _prefix(part: str) -> str:
    return "" if part == "tokens" else f"{part}."
