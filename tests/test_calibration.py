"""Calibration: estimators against dense grids and their definitions, the file beside the adapter, data in every form."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted_logits import statistics
from rows import model_rows
from tiny import batches, left_padded, tiny_llama, tiny_lora, two_model_logits

import svdecode
from svdecode.models.adapters import adapter_fingerprint
from svdecode.strength.estimators import ESTIMATORS
from svdecode.strength.family import MAX_STRENGTH, Family

ALPHA = 0.05


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


def logits_and_labels(lora, data):
    pre, ft, labels = [], [], []
    for batch in data:
        a, z = two_model_logits(lora, batch["input_ids"], batch["attention_mask"])
        used = batch["labels"][:, 1:] != -100
        pre.append(a[:, :-1][used])
        ft.append(z[:, :-1][used])
        labels.append(batch["labels"][:, 1:][used])
    return torch.cat(pre), torch.cat(ft), torch.cat(labels)


@pytest.mark.parametrize("direction", ["kl", "log_ratio"])
def test_calibrate_equals_the_definitions(lora, direction):
    data = batches()
    cal = svdecode.calibrate(lora, data, alpha=ALPHA, direction=direction, progress=False)
    pre, ft, labels = logits_and_labels(lora, data)
    settings = dict(alpha=ALPHA, direction=direction)
    out = svdecode.fused_steer(pre.double(), ft.double(), 1.0, labels=labels, **settings)
    assert cal.num_tokens == len(labels) == 3 * 4 * 6
    n, d, h = out.moments.unbind(-1)
    ordered = out.mu_star.sort().values
    expected = {
        "mean": out.mu_star.mean(),
        "median": (ordered[35] + ordered[36]) / 2,
        "trimmed": ordered[7:-7].mean(),
        "ratio": n.sum() / d.sum(),
        "newton": n.sum() / h.sum(),
    }
    for name, value in expected.items():
        assert cal.estimates[name] == pytest.approx(value.item(), rel=1e-3), name
    assert cal.mean_kl == pytest.approx(out.kl.mean().item(), rel=1e-4)
    assert cal.kept == pytest.approx(out.num_kept.double().mean().item())
    covered = svdecode.steered_nll(pre.double(), ft.double(), labels, pre.new_zeros(1).double(), **settings).isfinite()
    assert 0 < cal.coverage < 1
    assert cal.coverage == pytest.approx(covered.double().mean().item())

    grid = torch.linspace(cal.estimates["exact"] - 2, cal.estimates["exact"] + 2, 401, dtype=torch.float64)
    nll = svdecode.steered_nll(pre.double(), ft.double(), labels, grid, **settings)[covered.squeeze(-1)].mean(0)
    torch.testing.assert_close(cal.curve(grid), nll, rtol=1e-3, atol=1e-4)  # interpolated
    assert grid[nll.argmin()].item() == pytest.approx(cal.estimates["exact"], abs=0.011)
    assert cal.mu == cal.estimates["exact"]


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 40), alpha=st.sampled_from([0.0, 0.02, 0.3]))
def test_exact_is_the_minimum(seed, rows, alpha):
    torch.manual_seed(seed)
    pre, ft = model_rows(rows, 30, dtype=torch.float32, spread=1.5)
    labels = torch.where(torch.rand(rows) < 0.5, ft.argmax(-1), torch.randint(30, (rows,)))
    tokens = statistics(pre, ft, labels, Family("kl", alpha))
    if tokens.coverage == 0:
        return
    best = ESTIMATORS["exact"](tokens)
    assert abs(best) <= MAX_STRENGTH
    others = torch.linspace(best - 5, best + 5, 41, dtype=torch.float64).clamp(-MAX_STRENGTH, MAX_STRENGTH)
    mus = torch.cat([torch.tensor([best], dtype=torch.float64), others])
    nll = svdecode.steered_nll(pre.double(), ft.double(), labels, mus, alpha=alpha)
    nll = nll[tokens.gold.kept].mean(0)
    assert (nll[1:] >= nll[0] - 1e-7).all()


def test_saved_beside_the_adapter_and_found_by_its_weights(lora, tmp_path, monkeypatch):
    monkeypatch.setattr("svdecode.strength.calibration._SAVED", {}, raising=True)
    cal = svdecode.calibrate(lora, batches(), alpha=ALPHA, estimator="newton", progress=False)
    assert cal.mu == cal.estimates["newton"]
    with pytest.raises(ValueError, match="mu is missing"):
        svdecode.steer(lora)
    lora.save_pretrained(tmp_path)
    cal.save_pretrained(tmp_path)
    assert {"adapter_config.json", "svdecode.json"} <= {p.name for p in tmp_path.iterdir()}
    loaded = svdecode.Calibration.from_pretrained(tmp_path)
    assert (loaded.mu, loaded.estimates, loaded.coverage) == (cal.mu, cal.estimates, cal.coverage)
    assert torch.equal(loaded.curve([0.0, 1.0]), cal.curve([0.0, 1.0]))

    from peft import PeftModel

    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert svdecode.steer(again).settings == svdecode.Setting(cal.mu, ALPHA)  # all of it follows the calibration
    assert svdecode.steer(again, mu=loaded, alpha=ALPHA, penalty=-2.0).settings == svdecode.Setting(cal.mu, ALPHA, -2.0)
    with pytest.raises(ValueError, match=r"mu was calibrated with alpha=0\.05"):
        svdecode.steer(again, alpha=0.1)
    assert json.loads((tmp_path / "svdecode.json").read_text())["schema"] == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a calibration"),
        ("{}", "schema"),
        ('{"schema": 9}', "schema 9"),
        ('{"schema": 1}', "not a calibration"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, words):
    with pytest.raises(ValueError, match=r"svdecode\.json is missing"):
        svdecode.Calibration.from_pretrained(tmp_path)
    (tmp_path / "svdecode.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        svdecode.Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize("mu", [139.0, -90.0, 0.01])
def test_the_figure_shows_the_chosen_strength_however_far_it_is(mu):
    from types import SimpleNamespace

    from svdecode.strength.figure import view

    estimates = {"exact": mu, "newton": 0.4 * mu, "mean": 14.0}
    intervals = {"exact": [0.9 * mu, 1.2 * mu]} if mu > 0 else {"exact": [1.2 * mu, 0.9 * mu]}
    low, high = view(SimpleNamespace(mu=mu, estimator="exact", estimates=estimates, intervals=intervals))
    assert low < min(0.0, *intervals["exact"]) <= max(0.0, *intervals["exact"]) < high
    assert high - low < 2 * max(abs(mu), 0.25)


def test_plot(lora, tmp_path):
    cal = svdecode.calibrate(lora, batches(), alpha=ALPHA, progress=False)
    cal.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_what_calibrate_refuses(lora):
    ids, mask = left_padded()
    unlabelled = [{"input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, -100)}]
    with pytest.raises(ValueError, match="no labelled token"):
        svdecode.calibrate(lora, unlabelled, progress=False)
    with pytest.raises(ValueError, match="data is empty"):
        svdecode.calibrate(lora, [], progress=False)
    with pytest.raises(ValueError, match=r"data\[0\] must be a mapping"):
        svdecode.calibrate(lora, ["text"], progress=False)
    with pytest.raises(ValueError, match="tokenizer is needed"):
        svdecode.calibrate(lora, [{"prompt": "a", "completion": "b"}], progress=False)
    with pytest.raises(TypeError, match="data must be"):
        svdecode.calibrate(lora, "file.jsonl", progress=False)
    with pytest.raises(ValueError, match="estimator must be one of"):
        svdecode.calibrate(lora, batches(), estimator="best", progress=False)
    with pytest.raises(ValueError, match="alpha"):
        svdecode.calibrate(lora, batches(), alpha=2.0, progress=False)
    with pytest.raises(ValueError, match="needs input_ids and labels"):
        svdecode.calibrate(lora, iter([{"input_ids": ids}]), progress=False)


def test_no_gold_token_inside_the_kept_set(lora):
    ids = torch.randint(3, 97, (2, 6))
    with torch.no_grad():
        worst = lora(input_ids=ids).logits.argmin(-1)
    labels = torch.cat([torch.full((2, 1), -100), worst[:, :-1]], 1)
    with pytest.raises(ValueError, match="no gold token is inside the kept set"):
        svdecode.calibrate(lora, [{"input_ids": ids, "labels": labels}], progress=False)


def test_another_adapter_is_refused(lora, tmp_path):
    cal = svdecode.calibrate(lora, batches(), alpha=ALPHA, progress=False)
    own = adapter_fingerprint(lora)
    assert cal.setting_for(own, alpha=ALPHA, penalty=0.0) == svdecode.Setting(cal.mu, ALPHA, 0.0, "kl")
    with pytest.raises(ValueError, match="mu was calibrated for another adapter"):
        cal.setting_for(adapter_fingerprint(tiny_lora(r=2)))
    with pytest.raises(ValueError, match="mu was calibrated with alpha"):
        cal.setting_for(own, alpha=0.3)
    with pytest.raises(ValueError, match="mu was calibrated with direction='kl'"):
        cal.setting_for(own, direction="log_ratio")


def test_logits_that_are_not_finite_are_an_error(lora):
    import copy

    broken = copy.deepcopy(lora)
    with torch.no_grad():
        broken.get_base_model().lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN or infinite at 24 of 24 gold tokens of data"):
        svdecode.calibrate(broken, batches(1), alpha=ALPHA, progress=False)


def test_old_files_and_interrupted_ones(lora, tmp_path):
    """Older schemas are read; statistics of another calibration are not mixed in; a failed write leaves the old files."""
    cal = svdecode.calibrate(lora, batches(), alpha=ALPHA, progress=False)
    cal.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "svdecode.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"svdecode.json", "svdecode.safetensors"}

    other = svdecode.calibrate(lora, batches(1), alpha=ALPHA, progress=False)
    other.save_pretrained(tmp_path / "other")
    mine = (tmp_path / "svdecode.safetensors").read_bytes()
    (tmp_path / "svdecode.safetensors").write_bytes((tmp_path / "other" / "svdecode.safetensors").read_bytes())
    mixed = svdecode.Calibration.from_pretrained(tmp_path)
    assert mixed.mu == cal.mu
    with pytest.raises(ValueError, match=r"svdecode\.safetensors is missing, or another's"):
        mixed.curve([0.0])
    (tmp_path / "svdecode.safetensors").write_bytes(mine)
    assert torch.equal(svdecode.Calibration.from_pretrained(tmp_path).curve([0.5]), cal.curve([0.5]))

    for schema in (1, 2):  # their statistics held kept sets, which are not read
        old = ("mu", "estimator", "estimates", "alpha", "direction", "coverage", "num_tokens", "mean_kl", "kept")
        old = {name: values[name] for name in (*old, "mu_star_quantiles", "adapter")}
        (tmp_path / "svdecode.json").write_text(json.dumps({"schema": schema, **old}))
        read = svdecode.Calibration.from_pretrained(tmp_path)
        assert (read.mu, read.intervals) == (cal.mu, {})
        with pytest.raises(ValueError, match="calibrate again"):
            read.plot(tmp_path / "old.png")
