"""One JSONL line a question, written as soon as it is known, so that an interrupted run goes on where it stopped.

The first line is the header, the settings of the run. Each process writes a file of its own; the first joins them in the end.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from svdecode import distributed
from svdecode.files import write_atomically

FILE_NAME = "records.jsonl"


class Records:
    """The records of a run, by the index of their question; kept in memory alone where there is no folder."""

    def __init__(self, folder: Path | None, settings: dict[str, object]) -> None:
        """Read what earlier runs left.

        Args:
            folder: where the files lie or will lie.
            settings: of the run (JSON); a file with other ones is refused.
        """
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.found: dict[int, dict] = {}
        rank, _ = distributed.rank_and_size()
        self.path = None if folder is None else folder / _name(rank)
        if folder is not None:
            for path in self._files():
                self.found |= self._read(path)
            distributed.wait()  # nobody writes before all have read
            self._start()
            distributed.wait()

    def add(self, records: list[dict]) -> None:
        """Keep new records and append them to the file."""
        fresh = [record for record in records if record["index"] not in self.found]
        self.found |= {record["index"]: record for record in fresh}
        if self.path is not None and fresh:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(record) for record in fresh))

    def finish(self, records: list[dict]) -> None:
        """All records in order, in one file; called by the first process with everyone's."""
        self.found = {record["index"]: record for record in records}
        if self.folder is not None:
            lines = [_line({"settings": self.settings}), *map(_line, records)]
            write_atomically(self.folder / FILE_NAME, "".join(lines).encode())
            for path in self._files():
                if path.name != FILE_NAME:
                    path.unlink()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("records*.jsonl") if path.is_file())

    def _start(self) -> None:
        """Give this process's file a header, and drop a half-written last line. The first process takes over all records."""
        mine = self.found.values() if distributed.is_main() else ()
        lines = [_line({"settings": self.settings}), *map(_line, sorted(mine, key=lambda record: record["index"]))]
        write_atomically(self.path, "".join(lines).encode())

    def _read(self, path: Path) -> dict[int, dict]:
        # What follows the last line's end was being written when the run was interrupted.
        complete = path.read_text(encoding="utf-8").split("\n")[:-1]
        rows = []
        for number, line in enumerate(complete, 1):
            try:
                rows.append(json.loads(line))
                _ = rows[-1]["settings" if number == 1 else "index"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: not a record of svdecode eval; use another --output"
                ) from None
        if not rows:
            return {}
        self._compare(path, rows[0]["settings"])
        return {row["index"]: row for row in rows[1:]}

    def _compare(self, path: Path, theirs: dict) -> None:
        names = sorted({*self.settings, *theirs})
        different = [name for name in names if self.settings.get(name) != theirs.get(name)]
        if different:
            raise ValueError(f"{path} was made with other settings ({', '.join(different)}): use another --output")


def _name(rank: int) -> str:
    return FILE_NAME if rank == 0 else f"records.rank{rank}.jsonl"


def _line(record: dict) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """JSON has no infinity: null stands for what is not a finite number."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
