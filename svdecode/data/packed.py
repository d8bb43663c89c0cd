"""Files that are not plain text: compressed ones are unpacked in memory, tables of Parquet and Arrow are read by pyarrow."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

SUFFIXES = (".parquet", ".arrow", ".feather", ".gz", ".zst", ".xz", ".bz2", ".zip", ".xlsx")
"""Endings of the names of such files. What a file is, its first bytes say."""

_JSON_LINES = "to_json('rows.jsonl', orient='records', lines=True)"
_SHEET = "is an Excel file, which svdecode does not read: save the sheet as CSV"


class _Packing(NamedTuple):
    kind: str
    unpack: Callable[[bytes], bytes]
    by_hand: str
    """A command that unpacks the file, where this Python cannot."""


def _unpack_zstandard(content: bytes) -> bytes:
    # Python 3.14 has it; before, one of two packages.
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name).decompress(content)
        except ImportError:
            continue
    zstandard = importlib.import_module("zstandard")
    found = b""
    while content:  # one frame after another
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            found += frame.decompress(content)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        if not frame.eof:
            raise ValueError("it ends too early")
        content = frame.unused_data
    return found


_PACKINGS = {
    b"\x1f\x8b": _Packing("gzip", gzip.decompress, "gunzip -k {path}"),
    b"BZh": _Packing("bzip2", bz2.decompress, "bunzip2 -k {path}"),
    b"\xfd7zXZ\x00": _Packing("xz", lzma.decompress, "unxz -k {path}"),
    b"\x28\xb5\x2f\xfd": _Packing("Zstandard", _unpack_zstandard, "unzstd {path}"),
}
_ZIP = b"PK\x03\x04"
_TABLES = {
    b"PAR1": ("Parquet", "pandas.read_parquet({path!r})"),
    b"ARROW1": ("Arrow", "pandas.read_feather({path!r})"),
    b"\xff\xff\xff\xff": ("Arrow", "datasets.Dataset.from_file({path!r})"),  # a stream, as `datasets` caches it
}


def unpacked(path: Path, content: bytes) -> tuple[bytes, str]:
    """What a compressed file holds, and the suffix that says how to read it (".jsonl" of rows.jsonl.gz), in lower case.

    Args:
        path: of the file.
        content: its bytes; those of a file that is not compressed are returned as they are.

    Raises:
        ValueError: a damaged file, a zip archive of several files, or a format that this Python cannot unpack.
    """
    name = PurePath(path.name)
    if content.startswith(_ZIP):
        return _from_zip(path, content)
    packing = next((found for start, found in _PACKINGS.items() if content.startswith(start)), None)
    if packing is None:
        return content, name.suffix.lower()
    try:
        content = packing.unpack(content)
    except ImportError:
        by_hand = packing.by_hand.format(path=path)
        raise ValueError(
            f"{path} is a {packing.kind} file, which this Python does not read: pip install zstandard, "
            f"or unpack it with: {by_hand}"
        ) from None
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be unpacked, it is a damaged {packing.kind} file: {error}") from None
    suffix = name.suffix.lower()
    return content, PurePath(name.stem).suffix.lower() if suffix in SUFFIXES else suffix


def _from_zip(path: Path, content: bytes) -> tuple[bytes, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX/" not in name]
            if "[Content_Types].xml" in names:
                raise ValueError(f"{path} {_SHEET}")
            if len(names) != 1:
                raise ValueError(f"{path} is a zip archive of {len(names)} files: name one of them, unpacked")
            return archive.read(names[0]), PurePath(names[0]).suffix.lower()
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked, it is a damaged or protected zip file: {error}") from None


def is_table(content: bytes) -> bool:
    """Whether a file is a Parquet or an Arrow file."""
    return any(content.startswith(start) for start in _TABLES)


def table_rows(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet or Arrow file with their places; ValueError for a damaged file, and one without pyarrow."""
    start = next(start for start in _TABLES if content.startswith(start))
    kind, read = _TABLES[start]
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        remedy = f"{read.format(path=str(path))}.{_JSON_LINES}"
        raise ValueError(
            f"{path} is a {kind} file, which needs the package datasets: pip install 'svdecode[train]'; "
            f"or write it as JSON lines, in Python with {remedy}"
        ) from None
    try:
        if start == b"PAR1":
            table = parquet.read_table(io.BytesIO(content))
        else:
            table = (ipc.open_file if start == b"ARROW1" else ipc.open_stream)(io.BytesIO(content)).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read, it is a damaged {kind} file: {error}") from None
    return ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1))
