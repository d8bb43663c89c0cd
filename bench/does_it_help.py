"""Which way of decoding helps a warm start, and after how many steps: the fair table of `svdecode calibrate` on some data.

    python bench/does_it_help.py --output runs/help countries truthfulqa=truthfulqa.csv arc_easy=ARC-Easy.train.json
    python bench/does_it_help.py --output runs/help --plot docs/images     # draws what is there again

For each data set the bundled SmolLM2-135M is warm-started with a LoRA, with the demo's settings and checkpoints. Each
checkpoint is calibrated on one part of the data and judged on another; no prompt is in two parts. "countries" is the demo's
task. Where a run was interrupted it goes on. Writes results.json and results.md into the output folder, and the figures of
docs/does-it-help.md.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from svdecode.calibration.calibrate import calibrate
from svdecode.common.figures import BLUE, GREY, ORANGE, load_pyplot, save_figure
from svdecode.common.files import to_json, write_atomically
from svdecode.common.tables import markdown_table, with_interval
from svdecode.data.examples import read_examples
from svdecode.data.splits import Splits, prompt_key
from svdecode.demo.facts import country_facts
from svdecode.demo.run import BATCH_SIZE, CHECKPOINTS, LEARNING_RATE
from svdecode.models.loading import load_adapter, load_model
from svdecode.strength.fair_table import CAPTION, table_cells
from svdecode.warmstart.folder import is_complete, step_folder
from svdecode.warmstart.train import warmstart

COUNTRIES = "countries"
PARTS = {"train": CHECKPOINTS[-1] * BATCH_SIZE, "calibration": 64, "test": 96}
WAYS = {  # of each figure: label, marker, colour; told apart without colours too
    "whole": {
        "best temperature": ("best temperature", "x", GREY),
        "kl, whole vocabulary": ("kl", "s", BLUE),
        "log_ratio, whole vocabulary": ("log_ratio", "o", ORANGE),
    },
    "masked": {
        "best temperature, alpha 0.1": ("best temperature", "x", GREY),
        "the paper's mean, alpha 0.1": ("kl, the paper's mean", "^", BLUE),
        "kl, alpha 0.1": ("kl, exact", "s", BLUE),
        "log_ratio, alpha 0.1": ("log_ratio, exact", "o", ORANGE),
    },
}


def parts_of(name: str, source: str | None, tokenizer: object, seed: int) -> dict[str, list[dict[str, str]]]:
    """The three parts of a data set."""
    if source is None:
        rows, splits = country_facts(seed, tokenizer, bundled=True)
        return {part: splits.select(rows, part)[: PARTS[part]] for part in PARTS}
    unique = {prompt_key(row): row for row in read_examples(source)}
    rows = [unique[key] for key in sorted(unique)]
    random.Random(seed).shuffle(rows)
    parts, start = {}, 0
    for part, size in PARTS.items():
        parts[part] = rows[start : start + size]
        start += size
    if not parts["test"]:
        raise ValueError(f"{name} has {len(rows)} prompts, too few for three parts of {PARTS}")
    return parts


def measure(name: str, source: str | None, folder: Path, seed: int) -> None:
    """Warm start and calibrations of one data set, as steps-N.json in its folder; what is there already is left."""
    wanted = [step for step in CHECKPOINTS if not (folder / f"step-{step}.json").is_file()]
    if not wanted:
        return
    base, tokenizer = load_model()
    parts = parts_of(name, source, tokenizer, seed)
    adapter = folder / "adapter"
    if not is_complete(adapter):
        splits = Splits.make(parts["train"], data=name, fractions=(1, 0, 0))
        warmstart(
            base, tokenizer, parts["train"], adapter, splits=splits, learning_rate=LEARNING_RATE, batch_size=BATCH_SIZE,
            save_steps=CHECKPOINTS, seed=seed,
        )  # fmt: skip
    for step in wanted:
        base, _ = load_model()
        model = load_adapter(base, step_folder(adapter, step))
        found = calibrate(model, parts["calibration"], tokenizer=tokenizer, held_out=parts["test"], seed=seed)
        values = {
            "coverage": found.coverage,
            "mean_kl": found.mean_kl,
            "table": found.table,
            "do": found.recommendation,
        }
        write_atomically(folder / f"step-{step}.json", to_json(values, indent=1).encode())


def collected(output: Path) -> dict[str, dict[int, dict]]:
    """All results of a folder, by data set and step."""
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(output.glob("*/step-*.json")):
        found.setdefault(path.parent.name, {})[int(path.stem[5:])] = json.loads(path.read_text())
    return {name: dict(sorted(steps.items())) for name, steps in found.items()}


def summary(found: dict[str, dict[int, dict]]) -> str:
    """One row for each data set and checkpoint: gains over the warm start, over all gold tokens, and what is recommended."""
    ways = list(WAYS["whole"])
    head = [
        "data",
        "steps",
        "NLL",
        *(label for label, _, _ in WAYS["whole"].values()),
        "log_ratio over temperature",
        "do",
    ]
    lines = []
    for name, steps in found.items():
        for step, values in steps.items():
            rows = {row["name"]: row for row in values["table"]}
            gains = [with_interval(rows[way], "gain", sign="+") for way in ways]
            over = with_interval(rows[ways[-1]]["over_temperature"], "gain", sign="+")
            row = values["do"]["row"]
            do = {"steering": row and f"{row['direction']}, mu {row['mu']:.2f}", "temperature": "temperature"}
            nll = f"{rows['warm start']['nll']:.3f}"
            lines.append([name, str(step), nll, *gains, over, do.get(values["do"]["use"], "keep the LoRA")])
    return markdown_table(head, lines)


def markdown(found: dict[str, dict[int, dict]]) -> str:
    """One table for each data set and checkpoint, and its recommendation."""
    parts = []
    for name, steps in found.items():
        for step, values in steps.items():
            title = f"## {name}, after {step} steps"
            parts.append(f"{title}\n\n{markdown_table(*table_cells(values['table']))}\n{values['do']['text']}\n")
    return "\n".join([summary(found), f"{CAPTION}\n", *parts])


def plot(found: dict[str, dict[int, dict]], which: str, path: Path) -> None:
    """Gains over the warm start with 95% intervals: a panel for each data set, a group for each checkpoint."""
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(1, len(found), figsize=(3.1 * len(found), 4), layout="constrained", squeeze=False)
    for axes, (name, steps) in zip(panels[0], found.items(), strict=True):
        for place, values in enumerate(steps.values()):
            rows = {row["name"]: row for row in values["table"]}
            for index, (way, (label, marker, colour)) in enumerate(WAYS[which].items()):
                if way not in rows or rows[way]["interval"] is None:
                    continue
                gain, (low, high) = rows[way]["gain"], rows[way]["interval"]
                at = place + 0.18 * (index - (len(WAYS[which]) - 1) / 2)
                axes.plot([at, at], [low, high], color=colour, linewidth=1.5)
                face = colour if low > 0 or high < 0 or marker == "x" else "white"
                axes.plot(
                    at, gain, marker, color=colour, markerfacecolor=face, markersize=6, label=None if place else label
                )
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(steps)), [str(step) for step in steps])
        axes.set_title(name, fontsize=10)
    panels[0][0].set_ylabel("gain over the warm start, nats per gold token")
    figure.supxlabel("warm-start steps (bars: 95% intervals; hollow: the interval contains 0)", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9)
    save_figure(figure, path)


def main() -> None:
    """Measure what is missing, then write and draw everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", help=f"NAME=FILE, or {COUNTRIES}")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="folder of the two figures; default: the output folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for each in arguments.data:
        name, _, source = each.partition("=")
        if not source and name != COUNTRIES:
            parser.error(f"{each}: NAME=FILE, or {COUNTRIES}")
        measure(name, source or None, arguments.output / name, arguments.seed)
    found = collected(arguments.output)
    if not found:
        parser.error(f"{arguments.output} holds no results: name some data")
    write_atomically(arguments.output / "results.json", to_json(found, indent=1).encode())
    write_atomically(arguments.output / "results.md", markdown(found).encode())
    folder = arguments.plot or arguments.output
    for which in WAYS:
        plot(found, which, folder / f"does-it-help-{which}.png")
    print((arguments.output / "results.md").read_text())


if __name__ == "__main__":
    main()
