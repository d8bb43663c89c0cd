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

from svdecode.common.files import to_json, write_atomically
from svdecode.strength.nll_curve import NLLCurve
from svdecode.strength.token_statistics import GoldTokens, TokenStatistics

FILE_NAME = "svdecode.json"
TOKENS_NAME = "svdecode.safetensors"
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


def load(folder: Path, parts: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values and whichever of the parts are there; ValueError, KeyError or AttributeError where a file is damaged."""
    values = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    schema, digest = values.pop("schema"), values.pop("tokens_sha256", None)
    if schema != SCHEMA and schema not in OLD_SCHEMAS:
        raise ValueError(f"schema {schema} is not {SCHEMA}")
    path = folder / TOKENS_NAME
    if schema in OLD_SCHEMAS or not path.is_file():
        return values, {}
    content = path.read_bytes()
    return values, _statistics(content, parts) if hashlib.sha256(content).hexdigest() == digest else {}


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
