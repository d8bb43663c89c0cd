"""The checkpoints of a warm start: the best way, the temperature and the worth of each; a known one is not read again."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_kit import quiet, tiny_tokenizer
from tiny import tiny_lora

import svdecode
from svdecode.evaluation.steps import best_way, evaluate_steps
from svdecode.strength.worth import worths

SCALES = {1: 0.2, 2: 0.5, 4: 1.0}


def rows_of(start: int, count: int = 12) -> list[dict[str, str]]:
    """Answers of one to four words, so that their order by length is not that of the questions."""
    return [
        {"prompt": f"what is w{i} ?", "completion": " ".join(f"w{(7 * i + j) % 60}" for j in range(1 + i * 5 % 4))}
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def model_of(step: int):
    model = tiny_lora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(SCALES[step])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("steps")
    for step in SCALES:
        model_of(step).save_pretrained(place / f"step-{step}")
    return place


@pytest.fixture(scope="module")
def whole(folder, tokenizer, tmp_path_factory):
    """(rows, output folder) of a run that reads every checkpoint."""
    output = tmp_path_factory.mktemp("out")
    return run(folder, tokenizer, [], output=output), output


def run(folder, tokenizer, loaded, **more):
    def load(path):
        loaded.append(int(path.name[5:]))
        return model_of(loaded[-1])

    return evaluate_steps(
        "nll", rows_of(20), folder, load, tokenizer, calibration_data=rows_of(0), progress=False, **more
    )


def calibrated(step, tokenizer, data=None):
    texts = [rows_of(0) if data is None else data, rows_of(20)]
    model = model_of(step)
    found = svdecode.calibrate(model, texts[0], held_out=texts[1], tokenizer=tokenizer, progress=False)
    return found, quiet("nll", texts[1], model, tokenizer, mu=found, estimators=["exact"], ablations=False)


def test_best_way_temperature_and_worth(whole, tokenizer):
    rows, output = whole
    found = [calibrated(step, tokenizer)[0] for step in SCALES]
    for row, calibration in zip(rows, found, strict=True):
        table = {one["name"]: one for one in calibration.table}
        steering = [table[f"{direction}, whole vocabulary"] for direction in ("kl", "log_ratio")]
        assert row["best"]["nll"] == pytest.approx(min(one["nll"] for one in steering))
        assert row["best"]["over_temperature"]["interval"]
        assert row["temperature"]["gain"] == pytest.approx(table["best temperature"]["gain"])
        assert row["warm_start"]["nll"] == pytest.approx(table["warm start"]["nll"])
    # Texts, in the order of the questions, give what the steps' own reading gives.
    judged = [[one.judged[best_way(one)[name]["name"]] for name in ("warm_start", "best")] for one in found]
    for row, worth in zip(rows, worths(list(SCALES), *zip(*judged, strict=True)), strict=True):
        assert row["worth"]["steps"] == pytest.approx(worth["steps"], rel=1e-3)
        assert row["worth"]["text"] == worth["text"]
    written = json.loads((output / "steps.json").read_text())
    assert [one["worth"]["text"] for one in written] == [row["worth"]["text"] for row in rows]
    page = (output / "steps.md").read_text()
    assert all(row["worth"]["text"] in page for row in rows)
    assert (output / "steps.png").read_bytes()[:4] == b"\x89PNG"


def test_a_known_checkpoint_is_not_read_again(whole, folder, tokenizer):
    loaded: list[int] = []
    rows = run(folder, tokenizer, loaded, known={4: calibrated(4, tokenizer)})
    assert loaded == [1, 2]
    for row, other in zip(rows, whole[0], strict=True):
        assert row["best"]["nll"] == pytest.approx(other["best"]["nll"], rel=1e-4)
        assert row["nll"] == pytest.approx(other["nll"], rel=1e-4)
        assert row["metric"]["SVDecode"]["mean"] == pytest.approx(other["metric"]["SVDecode"]["mean"], rel=1e-4)
        assert row["worth"]["text"] == other["worth"]["text"]


def test_one_that_rests_on_other_data_is(whole, folder, tokenizer):
    loaded: list[int] = []
    rows = run(folder, tokenizer, loaded, known={4: calibrated(4, tokenizer, rows_of(40))})
    assert loaded == [1, 2, 4]
    assert rows[2]["mu"] == pytest.approx(whole[0][2]["mu"])
