"""The demo's curves of both directions, what it prints of the fair table and of the worth, and what it does not read twice."""

from __future__ import annotations

import json

import pytest
from evaluation_kit import tiny_tokenizer
from tiny import tiny_llama, tiny_lora

import svdecode
from svdecode.common.files import to_json
from svdecode.demo.curves import direction_curves
from svdecode.demo.report import print_report
from svdecode.demo.run import run as demo
from svdecode.demo.run import warmstart
from svdecode.evaluation import steps

ROWS = [{"prompt": f"what is w{i % 20} ?", "completion": f"w{(7 * i) % 40} w{i}"} for i in range(40)]


def test_the_curves_pass_through_what_the_table_judged():
    model, tokenizer = tiny_lora(), tiny_tokenizer()
    calibration = svdecode.calibrate(model, ROWS[:20], held_out=ROWS[20:], tokenizer=tokenizer, progress=False)
    curves = direction_curves(model, ROWS[20:], calibration, tokenizer, 8, progress=False)
    table = {row["name"]: row for row in calibration.table}
    assert set(curves) == {"kl", "log_ratio"}
    for direction, curve in curves.items():
        row = table[f"{direction}, whole vocabulary"]
        assert curve["mu"] == row["mu"] != 0
        for at, change in ((0.0, 0.0), (row["mu"], -row["gain"])):
            (place,) = [i for i, mu in enumerate(curve["mus"]) if mu == pytest.approx(at, abs=1e-9)]
            assert curve["change"][place] == pytest.approx(change, abs=1e-5)
        assert all(a <= b <= c for a, b, c in zip(curve["low"], curve["change"], curve["high"], strict=True))


def test_the_last_checkpoint_is_read_once_and_curves_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    base = tmp_path / "model"
    tiny_tokenizer().save_pretrained(base)
    tiny_llama().save_pretrained(base)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "{row["prompt"]}", "completion": "{row["completion"]}"}}\n' for row in ROWS))
    calibrated, trained = [], []

    def counted(*arguments, **more):
        calibrated.append(1)
        return svdecode.calibrate(*arguments, **more)

    def with_two_checkpoints(*arguments, **more):
        trained.append(1)
        return warmstart(*arguments, **{**more, "save_steps": [2, *more["save_steps"]]})

    monkeypatch.setattr(steps, "calibrate", counted)
    monkeypatch.setattr("svdecode.demo.run.warmstart", with_two_checkpoints)
    arguments = {"model": str(base), "data": data, "output": tmp_path / "out", "progress": False}
    first = demo(**arguments, show=print_report)
    assert [row["step"] for row in first["steps"]] == [2, 6]
    assert len(calibrated) == 1  # step 2; step 6 is the adapter, which the demo has calibrated itself
    last = first["steps"][-1]
    assert last["best"] == first["best"]
    assert last["nll"] == first["held_out"]["nll"]
    printed = " ".join(capsys.readouterr().out.split())
    assert " ".join(first["recommendation"]["text"].split()) in printed
    assert "log_ratio, whole vocabulary" in printed
    assert "worth in steps" in printed
    assert all(f"After {step} steps" in printed for step in (2, 6))

    def forbidden(*_, **__):
        raise AssertionError("read again")

    monkeypatch.setattr("svdecode.demo.run.direction_curves", forbidden)
    monkeypatch.setattr("svdecode.demo.run.evaluate_steps", forbidden)
    monkeypatch.setattr("svdecode.demo.run.calibrate", forbidden)
    second = demo(**arguments)
    assert len(trained) == 1
    assert second["mu"] == first["mu"]
    for name in ("nll_all_tokens", "held_out", "best", "table", "recommendation", "exact_match"):
        assert json.loads(to_json(second[name])) == json.loads(to_json(first[name])), name
    assert second["curves"] == first["curves"]
    assert [row["worth"]["text"] for row in second["steps"]] == [row["worth"]["text"] for row in first["steps"]]
    # A calibration that another command has put there is not the demo's.
    changed = tmp_path / "out" / "adapter" / "svdecode.json"
    changed.write_text(changed.read_text() + " ")
    with pytest.raises(AssertionError, match="read again"):
        demo(**arguments)
