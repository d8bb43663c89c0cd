"""The table of `docs/reproducing.md` out of the folders that `bench/reproduce.sh` has filled, or the best of its rates.

python bench/reproduce_table.py runs/truthfulqa truthfulqa_mc
python bench/reproduce_table.py --best runs/truthfulqa/tuned/lora-*
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

PRETRAINED, WARM, STEERED = "pre-trained", "warm start", "SVDecode (exact)"


def rows(runs: Path, task: str) -> list[str]:
    """Markdown: one row for each finished warm start."""
    found = []
    for folder in sorted(runs.iterdir()):
        file = folder / task / "results.json"
        if not file.is_file():
            continue
        report, calibration = json.loads(file.read_text()), json.loads((folder / "svdecode.json").read_text())
        settings = json.loads((folder / "svdecode-warmstart.json").read_text())["settings"]
        metrics = list(report["results"])
        if not found:
            head = ["method", "learning rate", "coverage", "mu, exact [95%]"]
            head += [f"{m}: {PRETRAINED}, {WARM}, SVDecode" for m in metrics]
            head += [f"{m}: SVDecode - {WARM} [95%]" for m in metrics]
            head += ["share of each one's most frequent answer"]
            found = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        low, high = calibration["intervals"]["exact"]
        cells = [settings["method"], f"{settings['learning_rate']:g}", f"{calibration['coverage']:.2f}"]
        cells.append(f"{calibration['mu']:.2f} [{low:.2f}, {high:.2f}]")
        for metric in metrics:
            results = report["results"][metric]
            cells.append(", ".join(f"{results[system]['mean']:.3f}" for system in (PRETRAINED, WARM, STEERED)))
        for metric in metrics:
            change = report["comparisons"][metric][STEERED]
            low, high = change["interval"]
            cells.append(f"{change['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")
        usual = report["usual_answers"]
        cells.append(", ".join(f"{usual[system]['share']:.2f}" for system in (PRETRAINED, WARM, STEERED)))
        found.append(f"| {' | '.join(cells)} |")
    if not found:
        raise SystemExit(f"no finished run of {task} in {runs}")
    return found


def best_rate(folders: list[Path]) -> str:
    """The learning rate, as its folder METHOD-RATE has it, after which the warm start's NLL is lowest; each NLL on stderr."""
    found = {}
    for folder in folders:
        report = json.loads((folder / "nll" / "results.json").read_text())
        method = json.loads((folder / "svdecode-warmstart.json").read_text())["settings"]["method"]
        found[folder.name.removeprefix(f"{method}-")] = report["results"]["NLL"][WARM]["mean"]
    print(", ".join(f"{rate}: NLL {nll:.4f}" for rate, nll in found.items()), file=sys.stderr)
    return min(found, key=found.get)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--best", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("task", nargs="?")
    arguments = parser.parse_args()
    if arguments.best:
        print(best_rate(arguments.best))
    elif arguments.task is None:
        parser.error("runs and task are needed")
    else:
        print("\n".join(rows(arguments.runs, arguments.task)))
