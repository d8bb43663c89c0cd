"""Print how many instructions the kernels take per token, and what a model of one multiprocessor makes of them. No GPU needed.

    python bench/counts.py [--json FILE] [--compare FILE] [--cards ...] [--only NAME ...] [--operators NAME ...] [--quiet]

Counts are read off the machine code that ptxas made for sm_90 and bfloat16 inputs, on the way that a peaked row takes
(`ways.path`, `kernel_work.py`). Times come from `processor.py` with the code of each card: a model, not a measurement.
`--compare` prints a Markdown table of an older `--json` file and of now.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import triton
from kernel_counts import COUNTED_PIPES, cuda_counts, triton_counts
from kernel_work import BACKWARD, OPERATORS
from predictions import check_model, predict
from processor import CARDS

from svdecode.common.tables import markdown_table

TARGET = 90
SHAPES = ((512, 128_256), (8192, 128_256), (1, 151_936))


def backward_total(kernels: list[dict]) -> float | None:
    """Instructions per token of a peaked row over the passes of the backward; None where they were not all counted."""
    found = {}
    for row in kernels:
        constants = row.get("constants", {})
        name = row["kernel"].split("[")[0]
        if (
            name in BACKWARD
            and constants.get("DROP", True)
            and constants.get("DENSE", True)
            and constants.get("MODE", 0) == 0
        ):
            found[name] = row["instructions"]
    return sum(found.values()) if set(found) == set(BACKWARD) else None


def collect(cards: list[str], only: list[str] | None, operators: list[str]) -> dict[str, object]:
    """Everything that is printed."""
    kernels = triton_counts(only, TARGET) + cuda_counts(only, TARGET)
    model = []
    for name in operators:
        for card in cards:
            for rows, vocabulary in SHAPES:
                print(f"\r{name}, {card}, {rows} x {vocabulary}    ", end="", file=sys.stderr, flush=True)
                model.append(predict(name, CARDS[card], vocabulary, rows))
    print(file=sys.stderr)
    return {
        "date": datetime.date.today().isoformat(),
        "triton": triton.__version__,
        "target": f"sm_{TARGET}",
        "kernels": kernels,
        "backward": backward_total(kernels),
        "check": {card: check_model(CARDS[card]) for card in cards} if operators else {},
        "model": model,
    }


def _moves(row: dict) -> str:
    """Widths of loads and stores in one cell."""
    return "; ".join(
        ", ".join(f"{width} x {number}" for width, number in row[kind].items()) for kind in ("loads", "stores")
    )


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def counts_table(kernels: list[dict]) -> str:
    """Counts of each kernel."""
    columns = ["instructions", *COUNTED_PIPES, "barriers", "shuffles", "registers", "spilled"]
    last = ["before_first_load", "loads_before_first_wait"]
    rows = [
        [row["kernel"], *(_cell(row[c]) for c in columns), _moves(row), *(str(row[c]) for c in last)] for row in kernels
    ]
    header = ["kernel", *columns, "loads; stores (bytes x count)", "before the first load", "all loads before a wait"]
    return markdown_table(header, rows)


def model_table(model: list[dict]) -> str:
    """Predictions of each operator, card and shape."""
    rows = [
        [
            *(row["operator"], row["card"], f"{row['rows']} x {row['vocabulary']:,}", f"{row['share']:.0%}"),
            *(f"{row['us']:.1f}", " + ".join(f"{us:.1f}" for us in row["launches_us"]), row["limit"]),
        ]
        for row in model
    ]
    header = [
        "operator",
        "card",
        "rows x V",
        "model: of copy bandwidth",
        "model: us",
        "launches, us",
        "limit of the first",
    ]
    return markdown_table(header, rows)


def compare(before: dict, now: dict) -> str:
    """Counts and predictions that both have, side by side; what only one has is named with a dash."""

    def both(key: str, name: Callable[[dict], str], value: Callable[[dict], str]) -> list[list[str]]:
        old, new = {}, {}
        for labels, found in ((old, before), (new, now)):
            for row in found[key]:
                label = name(row)
                while label in labels:  # variants of one name differ in constants that it leaves out
                    label += "'"
                labels[label] = value(row)
        return [[label, old.get(label, "-"), new.get(label, "-")] for label in old | new]

    counts = both(
        "kernels", lambda r: r["kernel"], lambda r: f"{r['instructions']:.1f} ({r['alu']:.1f}), {r['registers']}"
    )
    times = both(
        "model",
        lambda r: f"{r['operator']}, {r['card']}, {r['rows']} x {r['vocabulary']:,}",
        lambda r: f"{r['share']:.0%}" if r["rows"] > 1 else f"{r['us']:.1f} us",
    )
    counts.append(["backward, all passes", *(f"{x['backward']:.1f}" if x["backward"] else "-" for x in (before, now))])
    dates = [f"{found['date']}, triton {found['triton']}" for found in (before, now)]
    return "\n".join(
        [
            markdown_table(["instructions per token (on the ALU pipe), registers", *dates], counts),
            markdown_table(["model: share of the copy bandwidth, or time", *dates], times),
        ]
    )


def main() -> None:
    """Count, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--compare", type=Path, help="an older file of --json")
    parser.add_argument("--cards", nargs="*", choices=CARDS, default=list(CARDS))
    parser.add_argument("--only", nargs="*", help="count the kernels alone whose names begin so")
    parser.add_argument("--operators", nargs="*", choices=OPERATORS, default=list(OPERATORS), help="model these alone")
    parser.add_argument("--quiet", action="store_true", help="print no table")
    arguments = parser.parse_args()
    found = collect(arguments.cards, arguments.only, arguments.operators)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.quiet:
        return
    if arguments.compare:
        print(compare(json.loads(arguments.compare.read_text()), found), end="")
        return
    print(f"triton {found['triton']}, {found['target']}, bfloat16, per token of a peaked row\n")
    print(counts_table(found["kernels"]))
    if found["backward"]:
        print(f"Backward of fused_steer, all passes: {found['backward']:.1f} instructions per token\n")
    for card, shares in found["check"].items():
        print(f"model, {card}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    if found["model"]:
        print("\n" + model_table(found["model"]), end="")


if __name__ == "__main__":
    main()
