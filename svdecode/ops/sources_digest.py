"""A digest of the C++ sources: a library says which it was built from. setup.py loads this file by its path."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sources_digest(csrc: Path) -> str:
    """16 hexadecimal digits that name the contents of the source files below `csrc`."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".h", ".inc", ".cpp", ".cu"):
            digest.update(f"{path.relative_to(csrc).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
