"""The fair table: warm start, temperature, both directions and the paper's estimate, each at its best, judged on other tokens.

Steering with a positive mu also sharpens the distribution, and a temperature does that without a second model. So a gain counts
where it is larger than the gain of the best temperature, on the same tokens.

There are two blocks, for a masked distribution gives a token outside the kept set an infinite NLL: all gold tokens, under the
settings that keep the whole vocabulary; and the kept gold tokens, under the masked ones. A gain is against the warm start of
its own block, masked in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdecode.common.tables import with_interval
from svdecode.constants import ALPHA, KL, LOG_RATIO
from svdecode.strength.bootstrap import crossed, paired_gain
from svdecode.strength.estimators import ESTIMATORS
from svdecode.strength.family import TEMPERATURE, Family, temperature_of
from svdecode.strength.nll_curve import NLLCurve
from svdecode.strength.token_statistics import GoldTokens, TokenStatistics

Row = dict[str, Any]

TITLE = "Other ways to decode, on tokens that did not choose the strength"
CAPTION = (
    "NLL and gains: nats per token; the gain over the warm start of the same block, and over its best temperature. "
    "Whole vocabulary: all gold tokens; alpha above 0: the kept gold tokens alone, masked."
)
"""What the words of the table mean."""


class _Candidate(NamedTuple):
    name: str
    family: Family
    estimator: str = "exact"


def compared(alpha: float = ALPHA) -> list[Family]:
    """The families of the table, whose masked ones have this threshold."""
    return [Family(direction, cut) for cut in (0.0, alpha) for direction in (TEMPERATURE, KL, LOG_RATIO)]


def fair_table(
    curves: Mapping[Family, NLLCurve],
    gold: Mapping[Family, GoldTokens],
    alpha: float = ALPHA,
    held_out: Mapping[Family, NLLCurve] | None = None,
    seed: int = 0,
) -> tuple[list[Row], dict[str, Tensor]]:
    """One row for each way of decoding; NLL and gains in nats per scored token.

    Args:
        curves: of the families that `compared` names, on the calibration data.
        gold: of those that steer.
        alpha: threshold of the masked rows.
        held_out: their curves on data that judge; None judges each half of the sequences at the strength of the other half.
        seed: of the halves and of the bootstrap.

    Returns:
        Rows with name, scored ("all" or "kept"), direction, alpha, mu, nll, gain and interval over the block's warm start, and
        over_temperature (gain and interval over its best temperature; None for these two), num_tokens. A temperature's mu is
        1 / T - 1. `interval` is None with fewer than two sequences. And, by the rows' names, (S, 2) float64: each sequence's
        NLL, summed over its scored tokens, and their number.
    """
    table, judgements = [], {}
    for cut in (0.0, alpha):
        where = "whole vocabulary" if cut == 0 else f"alpha {cut:g}"
        masked = "" if cut == 0 else f", {where}"
        judged = (curves if held_out is None else held_out)[Family(KL, cut)]
        plain, scored = judged.at(0.0), judged.scored
        if not bool(scored.any()):
            continue
        candidates = [
            _Candidate(f"best temperature{masked}", Family(TEMPERATURE, cut)),
            *(_Candidate(f"{direction}, {where}", Family(direction, cut)) for direction in (KL, LOG_RATIO)),
        ]
        if cut:
            candidates.append(_Candidate(f"the paper's mean, {where}", Family(KL, cut), "mean"))
        total = int(scored.sum())
        common = {"scored": "all" if cut == 0 else "kept", "alpha": cut, "num_tokens": total}
        table.append(
            {"name": f"warm start{masked}", "direction": None, "mu": 0.0, **common, "nll": (plain.sum() / total).item()}
            | {"gain": 0.0, "interval": None, "over_temperature": None}
        )
        best_temperature = plain
        judgements[f"warm start{masked}"] = torch.stack([plain, scored.double()], 1)
        for one in candidates:
            mu = _strength(one, curves, gold)
            found = _crossed(one, curves, gold, seed) if held_out is None else held_out[one.family].at(mu)
            judgements[one.name] = torch.stack([found, scored.double()], 1)
            over = None
            if one.family.direction == TEMPERATURE:
                best_temperature = found
            else:
                over = paired_gain(best_temperature - found, scored, seed)
            table.append(
                {"name": one.name, "direction": one.family.direction, "mu": mu, **common}
                | {
                    "nll": (found.sum() / total).item(),
                    **paired_gain(plain - found, scored, seed),
                    "over_temperature": over,
                }
            )
    return table, judgements


def _strength(
    one: _Candidate,
    curves: Mapping[Family, NLLCurve],
    gold: Mapping[Family, GoldTokens],
    sequences: Tensor | None = None,
) -> float:
    """The candidate's strength by all sequences, or by some; 0 where none of them is scored."""
    curve = curves[one.family]
    if one.estimator == "exact":
        chosen = curve if sequences is None else curve.select(sequences)
        return chosen.minima().nan_to_num(0.0).item()
    tokens = TokenStatistics(gold[one.family], curve)
    return ESTIMATORS[one.estimator](tokens if sequences is None else tokens.select(sequences))


def _crossed(
    one: _Candidate, curves: Mapping[Family, NLLCurve], gold: Mapping[Family, GoldTokens], seed: int
) -> Tensor:
    """(S,) NLL of each sequence at the strength of the other half, or of its own where there is no other."""
    curve = curves[one.family]
    if len(curve) < 2:
        return curve.at(_strength(one, curves, gold))
    return crossed(curve, lambda fitted: _strength(one, curves, gold, fitted), seed)[0]


def table_cells(table: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, as text."""
    rows = []
    for row in table:
        mu = temperature_label(row) if row["direction"] == TEMPERATURE else f"{row['mu']:.3f}"
        gain = with_interval(row, "gain", sign="+") if row["direction"] else ""
        over = with_interval(row["over_temperature"], "gain", sign="+")
        rows.append(
            [row["name"], mu if row["direction"] else "", f"{row['nll']:.3f}", gain, over, str(row["num_tokens"])]
        )
    return ["", "mu", "NLL", "gain [95%]", "over the temperature [95%]", "tokens"], rows


def temperature_label(row: Row) -> str:
    """Of a row of the best temperature: "T = 1.20"."""
    return f"T = {temperature_of(row['mu']):.2f}"


def recommended(table: list[Row], held_out: bool) -> dict[str, Any]:
    """What to do: {"use": "steering", "temperature" or "warm start", "text", "row"}.

    Steering is recommended where the whole interval of its gain is above 0, over the warm start and over the best temperature;
    of several such rows the one that gains most nats on the data, where a token that is not scored gains nothing.
    """
    how = "on held-out data" if held_out else "by cross-fitting"
    steering = [row for row in table if row["over_temperature"] is not None]
    better = [row for row in steering if _above_0(row) and _above_0(row["over_temperature"])]
    if better:
        row = max(better, key=lambda row: row["gain"] * row["num_tokens"])
        text = (
            f"Use {row['name']}, mu = {row['mu']:.4g}: {_measured(row)} {how}; over the best temperature "
            f"{_measured(row['over_temperature'])}."
        )
        return {"use": "steering", "text": text, "row": row}
    temperature = next(row for row in table if row["direction"] == TEMPERATURE)
    if temperature["interval"] is None:
        text = "What helps is not known: there are too few sequences for an interval; pass more data."
        return {"use": "warm start", "text": text, "row": None}
    if _above_0(temperature):
        best = temperature_of(temperature["mu"])
        text = (
            f"Keep your LoRA as it is, with temperature {best:.2f} in place of 1 where you sample: "
            f"{_measured(temperature)} {how}. Steering is not shown to be better than that."
        )
        return {"use": "temperature", "text": text, "row": temperature}
    return {
        "use": "warm start",
        "text": f"Keep your LoRA as it is: {how}, neither steering nor a temperature is shown to gain.",
        "row": None,
    }


def _above_0(found: Row) -> bool:
    return found["interval"] is not None and found["interval"][0] > 0


def _measured(found: Row) -> str:
    low, high = found["interval"]
    return f"a gain of {found['gain']:.4f} nats per token [{low:.4f}, {high:.4f}]"
