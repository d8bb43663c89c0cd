"""Turn the results of `bench/gpu.sh`, or files of `bench/operators.py`, into Markdown tables and a figure.

python bench/report.py bench/results/CARD-DATE/              # writes report.md and bandwidth.png into the folder
python bench/report.py bench/results/local.json [--png FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import targets

from svdecode.common.figures import BLUE, GREY, ORANGE, load_pyplot, save_figure
from svdecode.common.files import write_atomically
from svdecode.common.tables import markdown_table

OPERATOR_FILES = ("operators.json", "replay.json")
MARKERS = {"dense": "o", "greedy": "^", "scalars": "s"}
COLOURS = {"triton": BLUE, "cuda": ORANGE, "cpu": BLUE, "reference": BLUE, "compiled": GREY}


def heading(report: dict) -> str:
    """Card, versions and bandwidths."""
    speeds = ", ".join(
        f"{name} ({found['call']}) {found['bytes_per_second'] / 1e9:.0f} GB/s"
        f" [{found['quartiles'][0] / 1e9:.0f}, {found['quartiles'][1] / 1e9:.0f}]"
        for name, found in report["bandwidths"].items()
    )
    return f"{report['card']}, torch {report['torch']}, torch.compile {report['torch.compile']}, {report['date']}; {speeds}"


def operator_table(report: dict) -> str:
    """One row per shape, output and backend: microseconds with quartiles, share of the bound, times faster than the rivals."""
    lines = []
    for row in report["results"]:
        for backend in row["ours"]:
            ours = row["us"].get(backend)
            shape = f"{row['rows']} x {row['vocabulary']}", row["dtype"] + (", replay" if row["replay"] else "")
            if ours is None:
                lines.append([row["output"], *shape, backend, row["failed"].get(backend, ""), "", "", "", "", ""])
                continue
            low, high = row["quartiles_us"][backend]
            factors = [
                f"{row['us'][name] / ours:.1f} x" if name in row["us"] else row["failed"].get(name, "")
                for name in targets.RIVALS
            ]
            others = [
                f"{name} {bytes_moved / row['us'][name] / 1e3:.0f} GB/s"
                for name, bytes_moved in row["minimum_bytes"].items()
                if name not in (*row["ours"], *targets.RIVALS) and name in row["us"]
            ]
            extra = f"{row['extra_bytes_per_row'] / 1024:.1f}" if "extra_bytes_per_row" in row else ""
            measured = [f"{ours:.1f} [{low:.1f}, {high:.1f}]", f"{row['bound_us'] / ours:.0%}"]
            lines.append([row["output"], *shape, backend, *measured, *factors, ", ".join(others), extra])
    head = [
        "output",
        "rows x V",
        "dtype",
        "backend",
        "us",
        "of the bound",
        *targets.RIVALS.values(),
        "yardsticks",
        "extra KiB per row",
    ]
    skipped = f"\nNot measured, the time was up: {report['skipped']}\n" if report["skipped"] else ""
    return f"{heading(report)}\n\n{markdown_table(head, lines)}{skipped}"


def calls_table(report: dict) -> str:
    """Python per call."""
    rows = [
        [name, f"{us:.1f} [{report['quartiles_us'][name][0]:.1f}, {report['quartiles_us'][name][1]:.1f}]"]
        for name, us in report["us"].items()
    ]
    rows += [[name, error] for name, error in report["failed"].items()]
    return f"{report['card']}, one row of {report['vocabulary']}\n\n{markdown_table(['call', 'us'], rows)}"


def compile_table(report: dict) -> str:
    """Registers and spills of each variant."""
    rows = [
        [row["kernel"], *(str(row[name]) for name in ("registers", "spilled", "shared"))] for row in report["variants"]
    ]
    failed = "".join(f"\nFailed: {name}: {error.splitlines()[0]}\n" for name, error in report["failed"].items())
    title = f"{report['target']}, bf16, {report['processes']} processes, {report['seconds']:.0f} s"
    return f"{title}\n\n{markdown_table(['kernel', 'registers', 'spilled', 'shared'], rows)}{failed}"


def decoding_table(report: dict) -> str:
    """Tokens per second by batch."""
    parts = [
        f"{report['adapter']}, {report['dtype']}, {report['machine']}, {report['prompt']} + {report['new']} tokens\n"
    ]
    for result in report["results"]:
        rows = [
            [name, f"{row['tokens_per_second']:.1f}", f"{row['spread']:.0%}", f"{row['over_plain']:.2f}"]
            for name, row in result["variants"].items()
        ]
        parts.append(markdown_table([f"batch {result['batch']}", "tokens/s", "spread", "over plain"], rows))
    return "\n".join(parts)


def plot(report: dict, path: Path) -> None:
    """Achieved bytes a second over bytes moved, against the measured bandwidths."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    for output, marker in MARKERS.items():
        for name, colour in COLOURS.items():
            rows = [row for row in report["results"] if row["output"] == output and name in row["us"]]
            if not rows:
                continue
            moved = [row["minimum_bytes"][name] for row in rows]
            medians = [row["us"][name] for row in rows]
            lows, highs = zip(*(row["quartiles_us"][name] for row in rows), strict=True)
            speed, slow, fast = (
                [m / us / 1e3 for m, us in zip(moved, times, strict=True)] for times in (medians, highs, lows)
            )
            spread = [
                [s - a for s, a in zip(speed, slow, strict=True)],
                [b - s for s, b in zip(speed, fast, strict=True)],
            ]
            style = {"fmt": marker, "color": colour, "markersize": 5, "linewidth": 0.8}
            label = f"{'torch.compile' if name == 'compiled' else name}, {output}"
            axes.errorbar(moved, speed, yerr=[[max(x, 0.0) for x in side] for side in spread], label=label, **style)
    for (name, found), line in zip(report["bandwidths"].items(), ("-", "--"), strict=True):
        axes.axhline(
            found["bytes_per_second"] / 1e9, color="black", linewidth=0.8, linestyle=line, label=f"{name} bandwidth"
        )
    axes.set(xscale="log", yscale="log", xlabel="least bytes of the call", ylabel="least bytes over time (GB/s)")
    axes.set_title(report["card"], fontsize=10)
    axes.legend(fontsize=7)
    save_figure(figure, path)


def folder_report(folder: Path) -> str:
    """Everything that a folder of results has, as Markdown; the figures are written beside it."""
    parts = [f"# {folder.name}\n", f"## Targets\n\n```\n{targets.text(folder)}\n```\n"]
    parts += ["Quartiles in brackets.\n"]
    tables = dict.fromkeys(OPERATOR_FILES, operator_table) | {
        "calls.json": calls_table,
        "compile.json": compile_table,
    }
    tables |= {path.name: decoding_table for path in sorted(folder.glob("decoding-*.json"))}
    for name, table in tables.items():
        path = folder / name
        body = table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "not measured yet\n"
        parts.append(f"## {path.stem}\n\n{body}")
    for name in OPERATOR_FILES:
        if (folder / name).is_file():
            report, figure = json.loads((folder / name).read_text(encoding="utf-8")), f"bandwidth-{Path(name).stem}.png"
            try:
                plot(report, folder / figure)
                parts.append(f"![Bandwidth]({figure})\n")
            except ImportError as error:
                parts.append(f"No figure: {error}\n")
    return "\n".join(parts)


def main() -> int:
    """Print the tables; of a folder also write report.md and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", type=Path, nargs="+", help="folders of bench/gpu.sh, or files of bench/operators.py")
    parser.add_argument("--png", type=Path, help="the figure of the last file")
    arguments = parser.parse_args()
    for path in arguments.paths:
        if path.is_dir():
            text = folder_report(path.resolve())
            write_atomically(path / "report.md", text.encode())
        else:
            text = operator_table(json.loads(path.read_text(encoding="utf-8")))
        print(text)
    if arguments.png:
        plot(json.loads(arguments.paths[-1].read_text(encoding="utf-8")), arguments.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
