"""The figure of a warm start: the loss over its steps."""

from __future__ import annotations

from pathlib import Path

from svdecode.common.figures import BLUE, load_pyplot, save_figure
from svdecode.warmstart.folder import FIGURE_NAME


def plot_training(record: dict, output: Path) -> Path:
    """Draw training.png: the loss of each step and its running mean over a tenth of the steps.

    Args:
        record: of the warm start (`svdecode.warmstart.folder.read_record`).
        output: its folder.

    Returns:
        The file.
    """
    pyplot = load_pyplot()
    steps, losses = ([entry[name] for entry in record["loss"]] for name in ("step", "loss"))
    window = max(1, len(losses) // 10)
    smooth = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    # Dots too where there are few steps: a line through one point is nothing.
    dot = "o" if len(steps) <= 20 else None
    axes.plot(steps, losses, color="#a0aec0", linewidth=0.8, marker=dot, label="each step")
    axes.plot(steps, smooth, color=BLUE, linewidth=2, label=f"mean of {window} step{'s' * (window > 1)}")
    settings = record["settings"]
    axes.set_title(f"Warm start: {settings['method']}, learning rate {settings['learning_rate']:g}, {len(steps)} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per completion token)")
    axes.legend()
    save_figure(figure, output / FIGURE_NAME)
    return output / FIGURE_NAME
