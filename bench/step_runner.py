"""Run commands one after another or side by side, each with a log and a time limit; remember what is done.

Nothing that goes wrong in one step stops another that does not need it. What happened is in `state.json`, which is written
after each step, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from svdecode.common.files import to_json, write_atomically

UNFINISHED = 75
"""Exit status of a script that ran out of its budget and goes on in the next call."""
TIMED_OUT = 124
LEAST_SECONDS = 5.0
"""A step is not begun with less time than this."""
SHARE_OF_BUDGET = 0.85
"""Of a step's time: a script begins nothing new after it, and ends by itself."""
LAST_LINES = 20


class Step(NamedTuple):
    """One command."""

    name: str
    command: Sequence[str]
    """"{seconds}" in it becomes the budget of the script."""
    minutes: float
    """Expected, for `--list`."""
    limit: float = 450.0
    """Seconds."""
    needs: Callable[[], str | None] = lambda: None
    """What is missing, or None."""
    prints: str | None = None
    """A pattern that the log must hold: a run of no tests at all is no success."""
    folder: str = "."
    """Where the command runs, below the root."""
    results: Sequence[str] = ()
    """Files in the folder of the results, which the command goes on with where they are there."""
    always: bool = False
    """Run also where it was done before."""


class Outcome(NamedTuple):
    """What came of a step, as `state.json` has it."""

    kind: str
    """"done", "failed", "unfinished" (goes on in the next call), "left out" (something it needs is not on this machine)."""
    status: int
    seconds: float
    log: str
    reason: str


class Runner:
    """Runs steps and keeps their outcomes in one folder."""

    def __init__(self, output: Path, root: Path, environment: dict[str, str]) -> None:
        """Read what an earlier run has done.

        Args:
            output: the folder of the results.
            root: the folder that commands are relative to.
            environment: of all commands.
        """
        self.output, self.root, self.environment = output, root, environment
        self.state_file = output / "state.json"
        self.outcomes: dict[str, Outcome] = {}
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        if self.state_file.is_file():
            with contextlib.suppress(ValueError, TypeError):  # from another version: begin anew
                found = json.loads(self.state_file.read_text(encoding="utf-8"))
                self.outcomes = {name: Outcome(**outcome) for name, outcome in found.items()}

    def is_done(self, step: Step) -> bool:
        """Whether an earlier run did it, without a failure."""
        found = self.outcomes.get(step.name)
        return found is not None and found.kind == "done" and not step.always

    def forget(self, step: Step) -> None:
        """Do it anew: without its outcome and its results."""
        self.outcomes.pop(step.name, None)
        for name in step.results:
            (self.output / name).unlink(missing_ok=True)

    def note(self, step: Step, outcome: Outcome) -> None:
        """Remember what came of a step, and print it."""
        self.outcomes[step.name] = outcome
        text = to_json({name: found._asdict() for name, found in self.outcomes.items()}, indent=1)
        write_atomically(self.state_file, text.encode())
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"  {step.name}: {outcome.kind} in {outcome.seconds:.0f} s{reason}", flush=True)

    def run(self, steps: Sequence[Step], until: float, width: int = 1) -> None:
        """Run the steps of a stage that are not done yet.

        Args:
            steps: in their order.
            until: the time (`time.monotonic`) at which the last one has to end.
            width: how many run side by side.
        """
        with ThreadPoolExecutor(width) as pool:
            try:
                todo = {pool.submit(self.run_step, step, until): step for step in steps if not self.is_done(step)}
                for future in as_completed(todo):
                    self.note(todo[future], future.result())
            except BaseException:
                self.stop()
                raise

    def run_step(self, step: Step, until: float) -> Outcome:
        """One command, to its end or its limit."""
        log = self.output / "logs" / f"{step.name}.log"
        missing = step.needs()
        if missing:
            return Outcome("left out", 0, 0.0, str(log), missing)
        seconds = min(step.limit, until - time.monotonic())
        if seconds < LEAST_SECONDS or self.stopped:
            return Outcome("unfinished", UNFINISHED, 0.0, str(log), "not begun, the time was up")
        begin = time.monotonic()
        status = self.execute(step, seconds, log)
        spent = time.monotonic() - begin
        if (
            status == 0
            and step.prints
            and not re.search(step.prints, log.read_text(encoding="utf-8", errors="replace"))
        ):
            return Outcome("failed", 1, spent, str(log), f"its log does not hold {step.prints!r}")
        if status == TIMED_OUT:
            return Outcome("failed", status, spent, str(log), f"stopped after {seconds:.0f} s")
        if status == UNFINISHED:
            return Outcome("unfinished", status, spent, str(log), "the time was up")
        return Outcome(
            "failed" if status else "done", status, spent, str(log), f"exit status {status}" if status else ""
        )

    def execute(self, step: Step, seconds: float, log: Path) -> int:
        """The exit status of a command, whose output goes to a log."""
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [part.replace("{seconds}", f"{SHARE_OF_BUDGET * seconds:.0f}") for part in step.command]
        with log.open("w", encoding="utf-8") as file:
            print(f"$ {' '.join(command)}", file=file, flush=True)
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self.root / step.folder,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that its children end with it
                )
            except OSError as error:
                print(error, file=file)
                return 127
            self.running.add(process)
            try:
                return process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                return TIMED_OUT
            finally:
                end_session(process)
                self.running.discard(process)

    def stop(self) -> None:
        """End what is running, and begin nothing more."""
        self.stopped = True
        for process in list(self.running):
            end_session(process)

    def last_lines(self, name: str) -> list[str]:
        """The end of a step's log."""
        log = Path(self.outcomes[name].log)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        return lines[-LAST_LINES:]


def end_session(process: subprocess.Popen) -> None:
    """Kill a command and the children that it left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
