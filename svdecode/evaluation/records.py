"""One JSONL line per question, written as soon as it is known, so that an interrupted run goes on where it stopped.

The first line is the header, the settings of the run. Each process writes a file of its own; the first joins them in the end.
"""

from __future__ import annotations

import json
from pathlib import Path

from svdecode.common import distributed
from svdecode.common.files import JsonLines, to_json

FILE_NAME = "records.jsonl"


class Records:
    """The records of a run, by the index of their question; kept in memory alone where there is no folder."""

    def __init__(self, folder: Path | None, settings: dict[str, object]) -> None:
        """Read what earlier runs left.

        Args:
            folder: where the files lie or will lie.
            settings: of the run (JSON); a file with other ones is refused.
        """
        self.folder, self.settings = folder, json.loads(to_json(settings))
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
            JsonLines(self.path).append(fresh)

    def finish(self, records: list[dict]) -> None:
        """All records in order, in one file; called by the first process with everyone's."""
        self.found = {record["index"]: record for record in records}
        if self.folder is not None:
            JsonLines(self.folder / FILE_NAME).replace([{"settings": self.settings}, *records])
            for path in self._files():
                if path.name != FILE_NAME:
                    path.unlink()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("records*.jsonl") if path.is_file())

    def _start(self) -> None:
        """Give this process's file a header, and drop a half-written last line. The first process takes over all records."""
        mine = self.found.values() if distributed.is_main() else ()
        mine = sorted(mine, key=lambda record: record["index"])
        JsonLines(self.path).replace([{"settings": self.settings}, *mine])

    def _read(self, path: Path) -> dict[int, dict]:
        rows = []
        file = JsonLines(path, "not a record of svdecode eval; use another --output")
        for number, row in file.read():
            if not isinstance(row, dict) or ("index" if rows else "settings") not in row:
                raise file.error(number)
            rows.append(row)
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
