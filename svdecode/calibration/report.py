"""What a calibration found, as a report in Markdown beside svdecode.json, which has the numbers."""

from __future__ import annotations

import math
from pathlib import Path

from svdecode.common.files import write_atomically
from svdecode.common.tables import bounds, markdown_table
from svdecode.strength.calibration import Calibration
from svdecode.strength.fair_table import CAPTION, TITLE, table_cells
from svdecode.strength.verdict import HOW_JUDGED

REPORT_NAME = "svdecode-calibration.md"
FIGURE_NAME = "svdecode-calibration.png"


def markdown(calibration: Calibration, figure: str | None = None) -> str:
    """The report; `figure` is the name of a PNG beside it."""
    c = calibration
    penalty = "" if c.penalty is None else f", penalty = {c.penalty}"
    lines = [
        "# SVDecode calibration",
        "",
        f"**mu = {c.mu:.4f}** ({c.estimator}), alpha = {c.alpha}, direction = {c.direction}{penalty}",
        "",
        c.verdict(),
        "",
        *(f"Caution: {one['text']}\n" for one in c.cautions),
        *([f"![NLL over mu, estimates, mu* of single tokens]({figure})", ""] if figure else []),
        "## Estimates",
        "",
        markdown_table(["estimator", "mu", "95% interval", "NLL at mu"], _estimates(c)),
        "The intervals resample sequences. `exact` minimises the NLL; `mean` is what the paper uses and is heavy-tailed.",
        "",
        "## Gain: NLL of the kept gold tokens at 0 minus at mu, nats per token",
        "",
        markdown_table(
            ["data", "NLL at 0", "NLL at mu", "gain", "95% interval", "tokens", "sequences", "coverage"], _gains(c)
        ),
        *_comparison(c),
        *_selection(c),
        "## The tokens",
        "",
        markdown_table(["what", "value"], _facts(c)),
    ]
    return "\n".join(lines)


def write_report(calibration: Calibration, folder: str | Path, *, figure: str | Path | None = None) -> Path:
    """Write svdecode-calibration.md into the folder, atomically, and the figure where `figure` says; returns its path."""
    path, shown = Path(folder) / REPORT_NAME, None
    if figure is not None:
        calibration.plot(figure)
        beside = Path(figure).resolve().parent == path.resolve().parent
        shown = Path(figure).name if beside else str(Path(figure).resolve())
    write_atomically(path, markdown(calibration, shown).encode())
    return path


def _estimates(c: Calibration) -> list[list[str]]:
    nll = [math.nan] * len(c.estimates) if c.tokens is None else c.curve(c.estimates.values()).tolist()
    return [
        [f"**{name}**" if name == c.estimator else name, f"{mu:.4f}", bounds(c.intervals.get(name)), f"{value:.4f}"]
        for (name, mu), value in zip(c.estimates.items(), nll, strict=True)
    ]


def _gains(c: Calibration) -> list[list[str]]:
    rows = []
    for which, found in c.gains.items():
        numbers = [f"{found[name]:.4f}" for name in ("nll_at_0", "nll_at_mu")]
        sizes = [str(found["num_tokens"]), str(found["num_sequences"]), f"{found['coverage']:.3f}"]
        rows.append([HOW_JUDGED[which], *numbers, f"{found['gain']:+.4f}", bounds(found["interval"]), *sizes])
    return rows


def _comparison(c: Calibration) -> list[str]:
    if c.recommendation is None:
        return []
    return [f"## {TITLE}", "", markdown_table(*table_cells(c.table)), CAPTION, "", c.recommendation["text"], ""]


def _selection(c: Calibration) -> list[str]:
    if c.selection is None:
        return []
    head = ["mu", "alpha", "penalty", "direction", "score", "gain", "95% interval"]
    screened = "screened" in c.selection["table"][0]
    rows = []
    for row in c.selection["table"]:
        values = [f"{row['mu']:g}", f"{row['alpha']:g}", str(row["penalty"]), row["direction"]]
        if screened:
            values.append(f"{row['screened']:.4f}")
        if row["score"] is None:
            rows.append([*values, "", "", ""])
            continue
        values.append(f"{row['score']:.4f}")
        if row == c.selection["best"]:
            values = [f"**{value}**" for value in values]
        rows.append([*values, f"{row['gain']:+.4f}", bounds(row["interval"])])
    if screened:
        head.insert(4, "first choices")
    return [
        f"## Selection by {c.selection['metric']}: {c.selection['meaning']}",
        "",
        "Gains are against the warm start, the first row. The best row's is flattered by the choice; the verdict is not."
        + (" First choices: one forward screens all settings, and the best ones alone are scored." if screened else ""),
        "",
        markdown_table(head, rows),
    ]


def _facts(c: Calibration) -> list[list[str]]:
    quantiles = ", ".join(f"{float(level):.0%}: {value:.3f}" for level, value in c.mu_star_quantiles.items())
    facts = {
        "gold tokens": c.num_tokens,
        "sequences": c.num_sequences,
        "coverage (share of gold tokens inside the kept set)": f"{c.coverage:.4f}",
        "mean size of the kept set": f"{c.kept:.2f}",
        "mean KL(warm start, pre-trained), nats": f"{c.mean_kl:.4f}",
        "quantiles of mu*": quantiles,
        "bytes per gold token": f"{c.bytes_per_token or math.nan:.1f}",
        "estimated error of exact": f"{math.nan if c.exact_error is None else c.exact_error:.1e}",
        "adapter (SHA-256 of its weights)": c.adapter,
        "data (SHA-256 of ids and labels)": c.data,
        "held-out data": c.held_out_data,
    }
    return [[name, str(value)] for name, value in facts.items() if value is not None]
