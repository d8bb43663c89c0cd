"""The fair table on planted logits: what is best is found best, and nothing is recommended where nothing helps."""

from __future__ import annotations

import json
import math

import pytest
import torch
from planted_logits import best_of_a_grid, planted, planted_rows, reference_nll

import svdecode
from svdecode.calibration.report import markdown
from svdecode.strength.family import TEMPERATURE, Family


def gold_of(ft, log_target, seed=0):
    return torch.multinomial(log_target.softmax(-1), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


def calibrated(pre, ft, labels, **options):
    first, second, batches = planted(pre, ft, labels, 4)
    return svdecode.calibrate(second, batches, pretrained=first, progress=False, **options), second, first


def by_name(cal):
    return {row["name"]: row for row in cal.table}


def test_each_way_is_at_its_best_and_judged_on_other_tokens():
    pre, ft, labels = planted_rows(400)
    half = 200
    first, second, batches = planted(pre, ft, labels, 4)
    cal = svdecode.calibrate(
        second, batches[: half // 16], pretrained=first, held_out=batches[half // 16 :], progress=False
    )
    seen = sum(int((b["labels"] != -100).sum()) for b in batches[: half // 16])
    table = by_name(cal)
    assert list(table) == [
        "warm start", "best temperature", "kl, whole vocabulary", "log_ratio, whole vocabulary",
        "warm start, alpha 0.1", "best temperature, alpha 0.1", "kl, alpha 0.1", "log_ratio, alpha 0.1",
        "the paper's mean, alpha 0.1",
    ]  # fmt: skip
    families = {
        "best temperature": Family(TEMPERATURE, 0.0),
        "kl, whole vocabulary": Family("kl", 0.0),
        "log_ratio, whole vocabulary": Family("log_ratio", 0.0),
        "log_ratio, alpha 0.1": Family("log_ratio", 0.1),
    }
    fit, judge = (pre[:seen], ft[:seen], labels[:seen]), (pre[seen:], ft[seen:], labels[seen:])
    for name, family in families.items():
        row = table[name]
        assert row["mu"] == pytest.approx(best_of_a_grid(*fit, family), abs=2e-4), name
        at = reference_nll(*judge, family, [0.0, row["mu"]])
        assert row["nll"] == pytest.approx(at[1].item(), abs=1e-4), name
        assert row["gain"] == pytest.approx((at[0] - at[1]).item(), abs=1e-4), name
        assert row["interval"][0] < row["gain"] < row["interval"][1]
    difference = table["log_ratio, whole vocabulary"]["over_temperature"]["gain"]
    assert difference == pytest.approx(table["best temperature"]["nll"] - table["log_ratio, whole vocabulary"]["nll"])
    scored = {row["scored"]: row["num_tokens"] for row in cal.table}
    assert scored["all"] == len(judge[2])
    kept = judge[1] >= judge[1].amax(-1, keepdim=True) + math.log(0.1)
    assert scored["kept"] == int(kept.gather(1, judge[2][:, None]).sum())
    assert json.loads(json.dumps(cal.to_dict()))["table"] == cal.table
    text = markdown(cal)
    assert cal.recommendation["text"] in text
    assert "| log_ratio, whole vocabulary |" in text


def test_what_is_recommended():
    """Gold tokens of a steered distribution, of a cooler one, and of the warm start itself."""
    pre, ft, steered = planted_rows(600)
    cal, model, other = calibrated(pre, ft, steered)
    assert cal.recommendation["use"] == "steering"
    assert cal.recommendation["row"]["name"] == "log_ratio, whole vocabulary"
    assert "by cross-fitting" in cal.recommendation["text"]
    assert (cal.alpha, cal.direction) == (0.1, "kl")  # the paper's setting stays, unless the user asks

    chosen = calibrated(pre, ft, steered, recommend=True)[0]
    assert (chosen.alpha, chosen.direction) == (0.0, "log_ratio")
    assert chosen.mu == pytest.approx(cal.recommendation["row"]["mu"])
    assert svdecode.steer(model, pretrained=other, mu=chosen).settings == chosen.setting

    cooler = calibrated(pre, ft, gold_of(ft, 2.0 * ft), recommend=True)[0]
    assert cooler.recommendation["use"] == "temperature"
    assert "temperature 0.5" in cooler.recommendation["text"]
    assert cooler.setting == svdecode.Setting(0.0, 0.0, -math.inf, "kl")  # the warm start, with nothing cut off

    nothing = calibrated(pre, ft, gold_of(ft, ft))[0]
    assert nothing.recommendation["use"] == "warm start"
    assert nothing.recommendation["text"].startswith("Keep your LoRA as it is")
    few = calibrated(pre[:3], ft[:3], ft[:3].argmax(-1))[0]
    assert "not known" in few.recommendation["text"]


def test_cross_fitting_judges_by_the_other_half(monkeypatch):
    """No row's gain uses a strength that its own sequences chose."""
    from svdecode.strength import fair_table as module

    pre, ft, labels = planted_rows(80)
    asked = []
    own = module._strength
    monkeypatch.setattr(module, "_strength", lambda *a: asked.append(a[3] if len(a) > 3 else None) or own(*a))
    calibrated(pre, ft, labels)
    halves = [sequences for sequences in asked if sequences is not None]
    assert halves
    assert all(int(sequences.sum()) == 10 for sequences in halves)
    assert all(bool((a ^ b).all()) for a, b in zip(halves[::2], halves[1::2], strict=True))

    monkeypatch.undo()
    cal = calibrated(pre, ft, labels)[0]
    family = Family("log_ratio", 0.0)
    fitted = halves[0].repeat_interleave(4)
    total = 0.0
    for fit, judge in ((fitted, ~fitted), (~fitted, fitted)):
        mu = best_of_a_grid(pre[fit], ft[fit], labels[fit], family)
        at = reference_nll(pre[judge], ft[judge], labels[judge], family, [0.0, mu])
        total += (at[0] - at[1]).item() / 2
    row = by_name(cal)["log_ratio, whole vocabulary"]
    assert row["gain"] == pytest.approx(total, abs=1e-4)


def test_what_is_refused():
    pre, ft, labels = planted_rows(8)
    with pytest.raises(ValueError, match="recommend and select both choose"):
        calibrated(pre, ft, labels, recommend=True, select="nll")
    with pytest.raises(ValueError, match="penalty"):
        calibrated(pre, ft, labels, penalty=1.0)
    plain = calibrated(pre, ft, labels, compare=False)[0]
    assert (plain.table, plain.recommendation) == ([], None)


@pytest.mark.parametrize("penalty", [0.0, -1.0])
def test_a_penalty_is_part_of_the_setting(penalty):
    pre, ft, labels = planted_rows(200)
    cal, model, other = calibrated(pre, ft, labels, penalty=penalty, direction="log_ratio", compare=False)
    assert cal.mu == pytest.approx(best_of_a_grid(pre, ft, labels, Family("log_ratio", 0.1, penalty)), abs=1e-4)
    assert cal.exact_error < 1e-4
    assert svdecode.steer(model, pretrained=other, mu=cal).settings.penalty == penalty
    assert cal.gains["cross_fitted"]["num_tokens"] == 200
