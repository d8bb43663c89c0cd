"""The targets of the GPU kernels, held against what `bench/gpu.sh` measured: met, missed or not measured.

python bench/targets.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MET, MISSED, NOT_MEASURED = "met", "MISSED", "not measured"
BACKENDS = ("triton", "cuda")
BANDWIDTH_VOCABULARY, BANDWIDTH_ROWS, BANDWIDTH_DTYPE = 128256, 512, "bfloat16"
BANDWIDTH_SHARE = {"dense": 0.90, "greedy": 0.90}
"""Of the copy bandwidth, from BANDWIDTH_ROWS rows on."""
REPLAY_SHAPE, REPLAY_US, REPLAY_BACKEND = (1, 151936), 10.0, "cuda"
PYTHON_US = {"fused_steer": 45.0, "steer_sample, greedy": 35.0}
RIVALS = {"eager": "eager PyTorch", "compiled": "torch.compile"}


class Verdict(NamedTuple):
    """One line."""

    target: str
    status: str
    measured: str
    """With its quartiles, or why there is none."""


def load(folder: Path, name: str) -> dict:
    """A result file, {} where it is missing or was measured on a CPU."""
    path = folder / name
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("device") == "cuda" else {}


def judged(target: str, good: bool, measured: str) -> Verdict:
    """Met or missed."""
    return Verdict(target, MET if good else MISSED, measured)


def missing(target: str, results: dict, row: dict | None, backend: str) -> Verdict:
    """Not measured, and why."""
    if not results:
        why = "no result file of a GPU"
    elif row is None:
        why = "the time was up before this shape"
    else:
        why = row["failed"].get(backend, f"backend {backend} is not here")
    return Verdict(target, NOT_MEASURED, why)


def bandwidth_verdicts(results: dict) -> Iterator[Verdict]:
    """Share of the copy bandwidth, per output, backend and number of rows."""
    for output, wanted in BANDWIDTH_SHARE.items():
        rows = [
            row
            for row in results.get("results", [])
            if (row["output"], row["vocabulary"], row["dtype"]) == (output, BANDWIDTH_VOCABULARY, BANDWIDTH_DTYPE)
            and row["rows"] >= BANDWIDTH_ROWS
        ]
        for row in rows or [None]:
            count = row["rows"] if row else BANDWIDTH_ROWS
            for backend in BACKENDS:
                target = f"{output}, {count} x {BANDWIDTH_VOCABULARY}, {backend}: at least {wanted:.0%} of the copy bandwidth"
                if row is None or backend not in row["us"]:
                    yield missing(target, results, row, backend)
                    continue
                fast, slow = row["quartiles_us"][backend]
                share, high, low = (row["bound_us"] / us for us in (row["us"][backend], fast, slow))
                text = f"{share:.1%} [{low:.1%}, {high:.1%}], {row['us'][backend]:.1f} us"
                yield judged(target, share >= wanted, text)


def replay_verdict(results: dict) -> Verdict:
    """One row under graph replay."""
    rows, vocabulary = REPLAY_SHAPE
    target = f"dense, {rows} x {vocabulary}, {REPLAY_BACKEND}, graph replay: at most {REPLAY_US:.0f} us"
    wanted = ("dense", rows, vocabulary, BANDWIDTH_DTYPE)
    found = [r for r in results.get("results", []) if (r["output"], r["rows"], r["vocabulary"], r["dtype"]) == wanted]
    row = found[0] if found else None
    if row is None or REPLAY_BACKEND not in row["us"]:
        return missing(target, results, row, REPLAY_BACKEND)
    us, (low, high) = row["us"][REPLAY_BACKEND], row["quartiles_us"][REPLAY_BACKEND]
    return judged(target, us <= REPLAY_US, f"{us:.2f} us [{low:.2f}, {high:.2f}], {row['pairs']} pairs of inputs")


def python_verdicts(results: dict) -> Iterator[Verdict]:
    """Python per call, per operator and backend."""
    for name, wanted in PYTHON_US.items():
        for backend in BACKENDS:
            target, label = f"{name}, {backend}: at most {wanted:.0f} us of Python per call", f"{backend}: {name}"
            if label not in results.get("us", {}):
                failed = results.get("failed", {}).get(label, f"backend {backend} is not here")
                yield Verdict(target, NOT_MEASURED, failed if results else "no result file of a GPU")
                continue
            us, (low, high) = results["us"][label], results["quartiles_us"][label]
            yield judged(target, us <= wanted, f"{us:.1f} us [{low:.1f}, {high:.1f}]")


def rival_verdicts(results: dict, how: str) -> Iterator[Verdict]:
    """Faster than each rival wherever both were measured; the narrowest case is shown."""
    for rival, title in RIVALS.items():
        mode = f" ({results['torch.compile']})" if results and rival == "compiled" else ""
        for backend in BACKENDS:
            target = f"{backend}, {how}: faster than {title}{mode}"
            rows = [row for row in results.get("results", []) if backend in row["us"]]
            both = [row for row in rows if rival in row["us"]]
            if not both:
                why = f"no shape where both {backend} and {rival} ran" if results else "no result file of a GPU"
                yield Verdict(target, NOT_MEASURED, why)
                continue
            factors = {index: row["us"][rival] / row["us"][backend] for index, row in enumerate(both)}
            index = min(factors, key=factors.__getitem__)
            row = both[index]
            low = row["quartiles_us"][rival][0] / row["quartiles_us"][backend][1]
            high = row["quartiles_us"][rival][1] / row["quartiles_us"][backend][0]
            won = sum(factor > 1 for factor in factors.values())
            without = sum(rival in row["failed"] for row in rows)
            text = f"{won} of {len(both)} cases; least factor {factors[index]:.2f} [{low:.2f}, {high:.2f}] at "
            text += f"{row['output']}, {row['rows']} x {row['vocabulary']} {row['dtype']}"
            text += f"; it failed in {without} more" if without else ""
            yield judged(target, won == len(both), text)


def verdicts(folder: Path) -> list[Verdict]:
    """All targets."""
    operators, replay, calls = (load(folder, name) for name in ("operators.json", "replay.json", "calls.json"))
    return [
        *bandwidth_verdicts(operators),
        replay_verdict(replay),
        *python_verdicts(calls),
        *rival_verdicts(operators, "single calls"),
        *rival_verdicts(replay, "graph replay"),
    ]


def text(folder: Path) -> str:
    """One line per target, and a count."""
    found = verdicts(folder)
    lines = [f"{verdict.status:12}  {verdict.target}: {verdict.measured}" for verdict in found]
    count = {status: sum(verdict.status == status for verdict in found) for status in (MET, MISSED, NOT_MEASURED)}
    return "\n".join([*lines, ", ".join(f"{number} {status}" for status, number in count.items())])


def main() -> int:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    print(text(parser.parse_args().folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
