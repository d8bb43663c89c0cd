"""Files that appear whole or not at all, what goes into them as JSON, and reading it back."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

LARGEST_JSON = 16 * 2**20
"""Bytes of the largest file that `read_object` takes: a calibration has some thousand, a list of all modules some 100,000."""
LONGEST_INTEGER = 20
"""Digits."""


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace a file in one step: a reader, or an interrupted writer, meets the old content or the new.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)  # noqa: SIM115
    try:
        with file:
            file.write(content)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        raise


def check_writable(folder: str | Path) -> None:
    """Raise ValueError unless files can be made in a folder: said before long work.

    The test leaves nothing behind. A folder that is missing is not made: the nearest folder above it is tested.
    """
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    try:
        # Not delete=True: where closing the file fails, that leaves the file behind.
        file = tempfile.NamedTemporaryFile(dir=there, prefix=".svdecode.", delete=False)  # noqa: SIM115
        try:
            with file:
                file.write(b"\0" * 4096)
        finally:
            os.unlink(file.name)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}") from None


def plain(value: Any) -> Any:
    """The value fit for strict JSON: a number that is not finite becomes "inf", "-inf" or "nan", which `float` reads."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: object, indent: int | None = None) -> str:
    """The one way in which svdecode writes JSON: strict (`plain`), with letters of all languages as they are."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def read_object(path: str | Path, what: str, largest: int | None = LARGEST_JSON) -> dict[str, Any]:
    """The JSON object in a file that somebody may have edited, or that is not ours; strict, as `to_json` writes it.

    Args:
        path: the file.
        what: what it should be, with an article, for the message.
        largest: bytes that a larger file is refused for, unread; None reads files of any size.

    Raises:
        ValueError: names the file, says `what` it is not and why: a folder, too large, not UTF-8, not JSON, nested too deeply,
            no object, a key twice, NaN or an infinity, or an integer of more than `LONGEST_INTEGER` digits.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError("it is a folder")
        if largest is not None and path.stat().st_size > largest:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, and more than {largest:,} are not read")
        found = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_number,
        )
        if not isinstance(found, dict):
            raise ValueError(f"it holds {json.dumps(found)[:40]}, which is no object in braces")
    except RecursionError:
        raise ValueError(f"{path} is not {what}: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not {what}: {getattr(error, 'strerror', None) or error}") from None
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"the number {text[:LONGEST_INTEGER]}... has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:LONGEST_INTEGER]} is not a finite number")


class JsonLines:
    """A file with one JSON value per line, to which lines are appended as soon as they are known."""

    def __init__(self, path: Path, expected: str = "not JSON") -> None:
        """Nothing is read or written yet.

        Args:
            path: the file.
            expected: what a message says of a line that is wrong.
        """
        self.path, self.expected = path, expected

    def error(self, number: int) -> ValueError:
        """Names the file and a line that is wrong."""
        return ValueError(f"{self.path}, line {number}: {self.expected}")

    def read(self, partial: bool = True) -> list[tuple[int, Any]]:
        """(line number, value) of every line that is not empty; nothing where there is no file.

        Args:
            partial: leave out a last line without its end: it was being written when a run was interrupted.

        Raises:
            ValueError: `error` of a line that is not JSON.
        """
        # Not splitlines(): a JSON text may hold U+2028 and other line ends of Unicode as they are.
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() else []
        found = []
        for number, line in enumerate(lines[:-1] if partial else lines, 1):
            if line.strip():
                try:
                    found.append((number, json.loads(line)))
                except ValueError:
                    raise self.error(number) from None
        return found

    def append(self, values: Iterable[object]) -> None:
        """Add lines at the end."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{to_json(value)}\n" for value in values))

    def replace(self, values: Iterable[object]) -> None:
        """Write the whole file anew, atomically."""
        write_atomically(self.path, "".join(f"{to_json(value)}\n" for value in values).encode())

    def drop_partial_line(self) -> None:
        """Cut off a last line without its end, so that the next one begins on a line of its own."""
        if self.path.is_file():
            content = self.path.read_bytes()
            if content and not content.endswith(b"\n"):
                write_atomically(self.path, content[: content.rfind(b"\n") + 1])
