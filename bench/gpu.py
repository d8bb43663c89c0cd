"""Everything that needs a GPU: figures first, then tests. `bench/gpu.sh` starts it.

    bench/gpu.sh                          # all stages, about 35 minutes; results in bench/results/CARD-DATE/
    bench/gpu.sh --budget 540             # as far as 9 minutes go; the same command again goes on where it stopped
    bench/gpu.sh operators replay         # some stages (after install)
    bench/gpu.sh --list                   # the stages, with the minutes that they are expected to take
    bench/gpu.sh --dry-run --output DIR   # every stage on the CPU at tiny sizes, to try the machinery

A stage that is done is skipped the next time (--again repeats it), and one that failed or was cut off is taken up again. A
failure stops no other stage. All failures are printed at the end, after the targets. No network is needed.

Exit status: 0 all done, 1 something failed, 2 cannot begin, 3 not finished (call again), 130 interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import targets
from gpu_stages import Stage, stages
from step_runner import Runner

ROOT = Path(__file__).parents[1]
STAGE_SECONDS = 460.0
"""Below 8 minutes, for machines on which one command may take 10."""
FAILED, CANNOT_BEGIN, NOT_FINISHED, INTERRUPTED = 1, 2, 3, 130
PROBE = "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'; print(torch.cuda.get_device_name())"
NOT_ARCHIVED = ("site", "site.part", "cache")
SOURCES = (".py", ".h", ".inc", ".cpp", ".cu")


def card_name() -> str:
    """Of the first GPU, fit for a folder.

    Raises:
        SystemExit: there is none, or torch cannot use it.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, env=environment_of(None)
    )
    if done.returncode:
        why = done.stderr.strip().splitlines()
        print(f"Cannot begin: {why[-1] if why else 'python ended'} ({sys.executable})", file=sys.stderr)
        print("`nvidia-smi` shows whether the driver sees a card; --dry-run needs none.", file=sys.stderr)
        raise SystemExit(CANNOT_BEGIN)
    return re.sub(r"[^A-Za-z0-9]+", "-", done.stdout.strip()).strip("-")


def environment_of(output: Path | None, dry_run: bool = False) -> dict[str, str]:
    """Of all commands: the installed package first, compiled kernels uninterpreted, caches beside the results."""
    found = dict(os.environ)
    for name in ("TRITON_INTERPRET", "SVDECODE_BACKEND", "SVDECODE_CUDA_EMULATION"):
        found.pop(name, None)
    if output is not None:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(output / "site"), os.environ.get("PYTHONPATH")]))
        found.setdefault("TRITON_CACHE_DIR", str(output / "cache" / "triton"))
        found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(output / "cache" / "inductor"))
    if dry_run:
        found["SVDECODE_CUDA_EMULATION"] = ""  # tests/conftest.py would compile it
    return {**found, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def write_archive(output: Path, archive: Path | None) -> None:
    """Everything but what can be made again, in one file."""
    if archive is None:
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz") as file:
        for path in sorted(output.iterdir()):
            if path.name not in NOT_ARCHIVED and path not in (archive.absolute(), part.absolute()):
                file.add(path, f"{output.name}/{path.name}")
    part.replace(archive)


def sources_digest() -> str:
    """Of everything that the figures are of."""
    digest = hashlib.sha256()
    files = [path for folder in ("svdecode", "kernels", "csrc") for path in (ROOT / folder).rglob("*")]
    for path in sorted(path for path in files if path.suffix in SOURCES):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def check_sources(output: Path, renew: bool) -> None:
    """Remember of which sources the results are.

    Raises:
        SystemExit: the folder has results of other sources, and they are not to be renewed.
    """
    path, now = output / "sources.txt", sources_digest()
    if not renew and path.is_file() and path.read_text() != now:
        print(
            f"Cannot begin: {output} has results of other sources. Name another --output, or repeat all with --again."
        )
        raise SystemExit(CANNOT_BEGIN)
    path.write_text(now)


def print_list(found: list[Stage]) -> None:
    """Names, expected minutes, and what they do."""
    for stage in found:
        print(f"{stage.name:12} {stage.minutes:4.1f} min  {stage.about}")
    print(f"{'all':12} {sum(stage.minutes for stage in found):4.1f} min")


def summary(runner: Runner, selected: list[Stage], output: Path) -> int:
    """Print targets, what is missing and what failed; the exit status."""
    print(f"\n== Targets\n{targets.text(output)}")
    steps = [step for stage in selected for step in stage.steps]
    by_kind: dict[str, list[str]] = {"failed": [], "unfinished": [], "left out": []}
    for step in steps:
        outcome = runner.outcomes.get(step.name)
        kind = outcome.kind if outcome else "unfinished"
        if kind in by_kind:
            by_kind[kind].append(step.name)
    if by_kind["left out"]:
        print("\n== Left out")
        for name in by_kind["left out"]:
            print(f"{name}: {runner.outcomes[name].reason}")
    if by_kind["unfinished"]:
        print(f"\n== Not finished, the same command goes on\n{', '.join(by_kind['unfinished'])}")
    if by_kind["failed"]:
        print("\n== FAILED")
        for name in by_kind["failed"]:
            outcome = runner.outcomes[name]
            print(f"\n-- {name}: {outcome.reason}, status {outcome.status}; the end of {outcome.log}:")
            print("\n".join(runner.last_lines(name)))
    done = len(steps) - sum(map(len, by_kind.values()))
    print(f"\n{done} of {len(steps)} steps done, {len(by_kind['failed'])} failed. Results: {output}", flush=True)
    return FAILED if by_kind["failed"] else NOT_FINISHED if by_kind["unfinished"] else 0


def interrupt(number: int, _frame: object) -> None:
    """A signal that ends a run like Ctrl-C: what is done is kept and printed."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Run the stages; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="left out, all")
    parser.add_argument("--list", action="store_true", help="print the stages and their expected minutes")
    parser.add_argument("--output", type=Path, help="folder of results and state (bench/results/CARD-DATE)")
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, help="a stage may take (%(default)s)")
    parser.add_argument("--budget", type=float, help="seconds of the whole call; left out, no limit")
    parser.add_argument("--again", action="store_true", help="repeat stages that are done")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of the results, written after every stage")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    arguments = parser.parse_args()
    begin = time.monotonic()
    if arguments.list:
        print_list(stages(Path("."), arguments.dry_run))
        return 0
    known = [stage.name for stage in stages(Path("."), arguments.dry_run)]
    unknown = [name for name in arguments.stages if name not in known]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; the stages are {', '.join(known)}")
    card = "dry-run" if arguments.dry_run else card_name()
    output = (arguments.output or ROOT / "bench" / "results" / f"{card}-{datetime.date.today()}").resolve()
    output.mkdir(parents=True, exist_ok=True)
    check_sources(output, renew=arguments.again and not arguments.stages)
    found = stages(output, arguments.dry_run)
    selected = [stage for stage in found if not arguments.stages or stage.name in arguments.stages]
    runner = Runner(output, ROOT, environment_of(output, arguments.dry_run))
    if arguments.again:
        for step in (step for stage in selected for step in stage.steps):
            runner.forget(step)
    print(f"{card}: results in {output}", flush=True)
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, interrupt)
    interrupted = False
    try:
        for number, stage in enumerate(selected, 1):
            if all(runner.is_done(step) for step in stage.steps):
                print(f"[{number}/{len(selected)}] {stage.name}: done before", flush=True)
                continue
            print(f"[{number}/{len(selected)}] {stage.name}, about {stage.minutes:.1f} min: {stage.about}", flush=True)
            until = time.monotonic() + arguments.seconds
            if arguments.budget is not None:
                until = min(until, begin + arguments.budget)
            runner.run(stage.steps, until, stage.width)
            write_archive(output, arguments.archive)
    except KeyboardInterrupt:
        interrupted = True
        print("Interrupted.", flush=True)
    status = summary(runner, selected, output)
    write_archive(output, arguments.archive)
    return INTERRUPTED if interrupted else status


if __name__ == "__main__":
    sys.exit(main())
