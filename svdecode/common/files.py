"""Files that appear whole or not at all, and what goes into them as JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
