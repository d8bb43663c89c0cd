"""Write the table of counted traffic into docs/kernels.md, between its markers.

    python docs/traffic_table.py [--check]

The numbers are those of `bench/traffic.py`, which counts what the Triton kernels load and store in the interpreter. It takes
minutes and no GPU. With --check nothing is written; the exit status is 1 where the page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- traffic:begin -->", "<!-- traffic:end -->"
VOCABULARY = 128_256


def table(rows: list[dict]) -> str:
    """Markdown of what `traffic.measure(VOCABULARY)` returns."""
    lines = [
        f"One row of V = {VOCABULARY:,}, bfloat16 in, float32 out; bytes.",
        "",
        "| rows | operator | minimum | loaded | stored | total / minimum |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [f"{row[name]:,}" for name in ("minimum", "loaded", "stored")]
        lines.append(f"| {row['rows']} | {row['operator']} | {' | '.join(numbers)} | {row['ratio']:.3f} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The table in a page; ValueError without both markers."""
    before, begin, rest = page.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} needs the markers {BEGIN} and {END}")
    return inside.strip()


def main() -> None:
    """Measure, and write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    old = written(page)
    sys.path.insert(0, str(ROOT / "bench"))
    import traffic

    import svdecode

    with svdecode.use_backend("triton"):
        new = table(traffic.measure(VOCABULARY))
    if arguments.check:
        raise SystemExit(0 if new == old else f"{PAGE.name} is out of date: python docs/traffic_table.py")
    start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(f"{page[:start]}\n{new}\n{page[stop:]}")


if __name__ == "__main__":
    main()
