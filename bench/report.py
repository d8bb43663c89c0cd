"""Turn result files of `bench/operators.py` into a Markdown table and a roofline PNG.

python bench/report.py bench/results/*.json [--png FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def table(report: dict) -> str:
    """One row a shape and output: microseconds, share of the bound, times faster than the rivals."""
    lines = [
        f"{report['card']}, torch {report['torch']}, {report['date']}, copy {report['copy_bandwidth'] / 1e9:.0f} GB/s",
        "",
        "| output | rows x V | svdecode us | of the bound | graph replay us | eager | torch.compile | extra KiB a row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        ours = row["us"].get("svdecode")
        if ours is None:
            continue

        def rival(name: str, row: dict = row, ours: float = ours) -> str:
            return f"{row['us'][name] / ours:.1f} x" if name in row["us"] else row["failed"].get(name, "")

        graph = f"{row['graph_us']:.1f}" if "graph_us" in row else ""
        extra = f"{row['extra_bytes_a_row'] / 1024:.1f}" if "extra_bytes_a_row" in row else ""
        lines.append(
            f"| {row['output']} | {row['rows']} x {row['vocabulary']} | {ours:.1f} | {row['bound_us'] / ours:.0%} | {graph} "
            f"| {rival('eager')} | {rival('compiled')} | {extra} |"
        )
    if report["skipped"]:
        lines.append(f"\nNot measured, the time was up: {report['skipped']}")
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Achieved bytes a second over bytes moved, against the copy bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for output, marker in (("dense", "o"), ("scalars", "s"), ("greedy", "^")):
        rows = [row for row in report["results"] if row["output"] == output and "svdecode" in row["us"]]
        moved = [row["minimum_bytes"] for row in rows]
        axes.plot(
            moved,
            [b / row["us"]["svdecode"] / 1e3 for b, row in zip(moved, rows, strict=True)],
            marker,
            label=f"svdecode, {output}",
        )
        rows = [row for row in rows if "compiled" in row["us"]]
        axes.plot(
            [row["minimum_bytes"] for row in rows],
            [row["minimum_bytes"] / row["us"]["compiled"] / 1e3 for row in rows],
            marker,
            fillstyle="none",
            color="grey",
            label=f"torch.compile, {output}",
        )
    axes.axhline(report["copy_bandwidth"] / 1e9, color="black", linewidth=0.8, label="copy")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("minimum bytes of the call")
    axes.set_ylabel("minimum bytes over time (GB/s)")
    axes.set_title(report["card"])
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Print a table a file, and draw the last file's roofline."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    for file in arguments.files:
        report = json.loads(file.read_text())
        print(table(report) + "\n")
    if arguments.png:
        plot(report, arguments.png)


if __name__ == "__main__":
    main()
