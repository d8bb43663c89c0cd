"""Settings by a task's metric against brute force, and `svdecode calibrate` on the command line."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_demo import examples, run, tiny_model  # noqa: F401  (fixtures)
from tiny import batches, tiny_lora, two_model_logits

import svdecode
from svdecode.calibration import metrics
from svdecode.calibration.grids import Grid, Scale
from svdecode.calibration.metrics import METRICS, Metric, Scores
from svdecode.calibration.selection import select_settings
from svdecode.cli.calibrate import calibrate as calibrate_command
from svdecode.ops.setting import Setting
from svdecode.strength.family import Family

GRID = Grid(mus=(0.5, 2.0), alphas=(0.05, 0.3), penalties=(0.0, -1.0))


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


def test_nll_of_every_setting(lora):
    data = batches()
    found = select_settings(lora, data, "nll", grid=GRID, progress=False)
    assert len(found["table"]) == 1 + 2 * 2 * 2 * 2
    assert found["num_sequences"] == 12
    logits = [two_model_logits(lora, batch["input_ids"], batch["attention_mask"]) for batch in data]
    for row in found["table"]:
        total = 0.0
        for batch, (pre, ft) in zip(data, logits, strict=True):
            settings = {name: row[name] for name in ("alpha", "penalty", "direction")}
            out = svdecode.fused_steer(pre[:, :-1], ft[:, :-1], row["mu"], **settings)
            labels = batch["labels"][:, 1:]
            logprobs = out.logprobs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
            total += logprobs[labels != -100].double().sum().item()
        assert row["score"] == pytest.approx(total / (3 * 4 * 6), rel=1e-4), row
    assert found["best"]["score"] == max(row["score"] for row in found["table"])
    warm = found["table"][0]
    assert (warm["mu"], warm["gain"]) == (0.0, 0.0)
    assert all(row["gain"] == pytest.approx(row["score"] - warm["score"]) for row in found["table"])
    assert all(low <= row["gain"] <= high for row in found["table"] for low, high in [row["interval"]])


def planted(values: torch.Tensor, monkeypatch) -> dict:
    """The selection from given scores (settings, S)."""
    grid = Grid(mus=(1.0, 2.0), alphas=(0.1,), penalties=(0.0,), directions=("kl",))
    scores = Scores(values, torch.ones(values.shape[1]).double())
    monkeypatch.setitem(METRICS, "planted", Metric(lambda *_: scores, Scale((1.0,), (0.0,)), "m"))
    return select_settings(tiny_lora(), [{}], "planted", grid=grid, progress=False)


def test_the_choice_is_judged_where_it_was_not_made(monkeypatch):
    torch.manual_seed(0)
    noise = torch.rand(3, 40).double()
    chance = planted(noise, monkeypatch)
    assert chance["best"]["gain"] >= chance["cross_fitted"]["gain"]
    assert chance["cross_fitted"]["interval"][0] <= 0 <= chance["cross_fitted"]["interval"][1]
    noise[2] += 2
    real = planted(noise, monkeypatch)
    assert real["best"]["mu"] == 2.0
    assert real["cross_fitted"]["gain"] == pytest.approx(real["best"]["gain"])
    assert real["cross_fitted"]["interval"][0] > 1
    same = planted(torch.ones(3, 40).double(), monkeypatch)
    assert same["best"]["mu"] == 0.0  # no steering where nothing is gained by it


def test_a_calibration_keeps_what_was_selected(lora, monkeypatch, tmp_path):
    scale = Scale((2.0,), (-1.0,), (0.3,), ("log_ratio",))
    values = torch.tensor([[0.0], [1.0]]).double().expand(2, 12)
    scored = METRICS["nll"]._replace(scale=scale, score=lambda *_: Scores(values, torch.ones(12).double()))
    monkeypatch.setitem(METRICS, "nll", scored)
    monkeypatch.setattr("svdecode.calibration.selection._scale_of", lambda curve: 2.0)
    cal = svdecode.calibrate(lora, batches(), select="nll", progress=False)
    assert (cal.mu, cal.alpha, cal.penalty, cal.direction) == (4.0, 0.3, -1.0, "log_ratio")
    assert (cal.estimator, cal.estimates["selected"]) == ("selected", 4.0)
    cal.save_pretrained(tmp_path)
    again = svdecode.Calibration.from_pretrained(tmp_path)
    assert (again.mu, again.penalty, again.selection) == (cal.mu, cal.penalty, cal.selection)
    assert svdecode.steer(lora, mu=again).settings == svdecode.Setting(4.0, 0.3, -1.0, "log_ratio")
    with pytest.raises(ValueError, match=r"calibrated with penalty=-1\.0"):
        svdecode.steer(lora, mu=again, penalty=-math.inf)
    cal.penalty = -math.inf
    cal.save_pretrained(tmp_path)
    assert svdecode.Calibration.from_pretrained(tmp_path).penalty == -math.inf
    assert "Infinity" not in (tmp_path / "svdecode.json").read_text()


def test_what_is_refused(lora):
    with pytest.raises(ValueError, match="select must be one of nll, exact_match"):
        svdecode.calibrate(lora, batches(), select="bleu", progress=False)
    with pytest.raises(ValueError, match="data must be a list or a Dataset"):
        svdecode.calibrate(lora, iter(batches()), select="nll", progress=False)
    with pytest.raises(ValueError, match="data is empty"):
        svdecode.calibrate(lora, [], select="nll", progress=False)
    with pytest.raises(ValueError, match="texts with prompt and completion"):
        svdecode.calibrate(lora, batches(), select="exact_match", progress=False)


def test_exact_match_of_every_setting(tiny_model, monkeypatch):  # noqa: F811
    """Each setting's answers are those of a model steered with it."""
    from peft import LoraConfig, get_peft_model
    from tiny import randomise

    from svdecode.models.loading import load_model

    base, tokenizer = load_model(str(tiny_model))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    randomise(model)
    model.eval()
    strong = Setting(4.0, 0.3, 0.0, "log_ratio")
    steered = svdecode.steer(model, **strong._asdict())
    data = []
    for i in range(12):
        ids = tokenizer(f"what is w{i} ?", return_tensors="pt").input_ids
        answer = svdecode.generate(steered, ids, max_new_tokens=3)[0, ids.shape[1] :]
        data.append({"prompt": f"what is w{i} ?", "completion": tokenizer.decode(answer, skip_special_tokens=True)})
    grid = Grid(mus=(4.0,), alphas=(0.3,), penalties=(0.0,), directions=("log_ratio",))
    monkeypatch.setattr(metrics, "LONGEST_ANSWER", 3)
    found = select_settings(model, data, "exact_match", tokenizer=tokenizer, batch_size=5, grid=grid, progress=False)
    assert [row["mu"] for row in found["table"]] == [0.0, 4.0]
    assert found["table"][1]["score"] == 1.0
    assert found["table"][0]["score"] < 1.0
    assert found["best"]["mu"] == 4.0
    assert found["table"][1]["screened"] > found["table"][0]["screened"]


def test_the_screen_is_what_greedy_decoding_would_say(lora):
    """All gold tokens first choices, by the reference's own steered log-probs; half where only the last one is not."""
    data = batches()
    source = metrics.Source(svdecode.steer(lora, mu=0.0), data, None, 4, None, False)
    settings = [Setting(0.0, 0.0), Setting(1.5, 0.01, -math.inf, "log_ratio"), Setting(3.0, 0.1)]
    for batch in data:  # gold tokens that one of the settings would choose
        pre, ft = two_model_logits(lora, batch["input_ids"], batch["attention_mask"])
        wanted = svdecode.fused_steer(pre, ft, 3.0, alpha=0.1).logprobs.argmax(-1)
        used = batch["labels"][:, 1:] != -100
        batch["labels"][:, 1:][used] = wanted[:, :-1][used]
        batch["labels"][0, -1] = 5
    scores = metrics.first_choices(source, settings)
    expected = []
    for batch in data:
        pre, ft = two_model_logits(lora, batch["input_ids"], batch["attention_mask"])
        labels = batch["labels"][:, 1:]
        rows = []
        for one in settings:
            best = (
                svdecode.fused_steer(pre, ft, one.mu, **one.keywords, backend="reference").logprobs[:, :-1].argmax(-1)
            )
            right = (best == labels) | (labels == -100)
            rows.append(right[:, :-1].all(1) * (1.0 + right[:, -1].double()) / 2)
        expected.append(torch.stack(rows))
    assert torch.equal(scores.values, torch.cat(expected, 1).double())
    assert {0.0, 0.5, 1.0} == set(scores.values.flatten().tolist())


def test_the_scale_starts_at_the_exact_strengths():
    scale = Scale((0.5, 1.0), (0.0, -1.0), (0.0, 0.1))
    families = scale.families()
    assert len(families) == 2 * 3  # over the whole vocabulary there is no penalty
    exact = {family: float(index + 1) for index, family in enumerate(families)}
    settings = scale.settings(exact)
    assert settings[0] == Setting(0.0, 0.0, 0.0, "kl")
    assert settings[1:7] == [family.setting(0.5 * mu) for family, mu in exact.items()]
    assert settings[7:] == [family.setting(mu) for family, mu in exact.items()]
    for metric in METRICS.values():  # the settings that measurements have found good
        for wanted in (Family("log_ratio", 0.0), Family("log_ratio", 0.01), Family("kl", 0.1)):
            assert any(found[:2] == wanted[:2] for found in metric.scale.families())


def test_at_most_three_settings_are_generated(monkeypatch):
    torch.manual_seed(1)
    ran = []
    screened = torch.rand(7, 20).double()

    def score(_, settings):
        ran.extend(settings)
        return Scores(screened[: len(settings)], torch.ones(20).double())

    metric = Metric(score, Scale((1.0,), (0.0,)), "m", lambda *_: Scores(screened, torch.ones(20).double()))
    monkeypatch.setitem(METRICS, "planted", metric)
    grid = Grid(mus=(1.0, 2.0, 3.0), alphas=(0.1,), penalties=(0.0,))
    data = [{"prompt": "a", "completion": "b"}]
    found = select_settings(tiny_lora(), data, "planted", tokenizer=object(), grid=grid, progress=False)
    assert len(ran) <= 3
    assert sum(row["score"] is not None for row in found["table"]) == len(ran)
    assert all(row["screened"] is not None for row in found["table"])
    assert found["best"]["score"] is not None


def test_a_screen_is_cross_fitted(monkeypatch):
    """Setting 1 is best on the first half and setting 2 on the other; each winner is judged where it did not win."""
    from svdecode.strength.bootstrap import halves

    first, _ = halves(20, 0)
    values = torch.stack([torch.zeros(20), first.double(), (~first).double()])
    metric = Metric(lambda _, settings: Scores(values, torch.ones(20).double()), Scale((1.0,), (0.0,)), "m")
    metric = metric._replace(screen=lambda *_: Scores(values, torch.ones(20).double()))
    monkeypatch.setitem(METRICS, "planted", metric)
    grid = Grid(mus=(1.0, 2.0), alphas=(0.1,), penalties=(0.0,), directions=("kl",))
    data = [{"prompt": "a", "completion": "b"}]
    found = select_settings(tiny_lora(), data, "planted", tokenizer=object(), grid=grid, progress=False)
    assert found["best"]["gain"] == 0.5
    assert found["cross_fitted"]["gain"] == 0.0


def test_command_line(tiny_model, examples, tmp_path):  # noqa: F811
    adapter, shared = tmp_path / "adapter", ("--model", tiny_model, "--data", examples)
    trained = run(
        "warmstart", *shared, "--output", adapter, "--learning-rate", "1e-2", "--split", "--fractions", "0.5/0.3/0.2"
    )
    assert trained.returncode == 0, trained.stderr
    common = ("calibrate", *shared, "--adapter", adapter)
    first = run(*common)
    assert first.returncode == 0, first.stderr
    assert "12 sequences" in " ".join(first.stdout.split())  # the calibration split
    assert "by cross-fitting" in first.stdout
    assert "log_ratio" in first.stdout
    assert "the paper's" in first.stdout
    assert "Next: svdecode generate" in first.stdout or "--recommend saves that" in first.stdout
    assert "tokens/s" in first.stderr
    assert (adapter / "svdecode-calibration.png").read_bytes()[:4] == b"\x89PNG"
    report = (adapter / "svdecode-calibration.md").read_text()
    assert "](svdecode-calibration.png)" in report

    chosen = run(*common, "--json", "--recommend")
    assert chosen.returncode == 0, chosen.stderr
    values = json.loads(chosen.stdout)
    assert values["alpha"] == 0.0  # over the whole vocabulary, or no steering at all
    assert values["mu"] == (
        values["recommendation"]["row"]["mu"] if values["recommendation"]["use"] == "steering" else 0.0
    )

    second = run(
        *common, "--json", "--held-out", examples, "--split", "all", "--select", "nll", "--estimator", "newton"
    )
    assert second.returncode == 0, second.stderr
    values = json.loads(second.stdout)
    saved = json.loads((adapter / "svdecode.json").read_text())
    assert saved.pop("schema") == 3
    saved.pop("tokens_sha256")
    assert values == saved
    assert values["num_sequences"] == 40
    assert set(values["gains"]) == {"calibration", "held_out"}
    assert "## Selection by nll" in (adapter / "svdecode-calibration.md").read_text()

    before = {path.name: path.read_bytes() for path in adapter.glob("svdecode*")}
    for options, words in (
        ({"select": "bleu"}, "select must be one of"),
        ({"estimator": "best"}, "estimator must be one of"),
        ({"held_out": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"split": "training"}, "must be one of train, calibration, test"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"penalty": 0.5}, "penalty"),
        ({"recommend": True, "select": "nll"}, "pass one of them"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate_command(data=str(examples), adapter=adapter, model=str(tiny_model), **options)
    assert {path.name: path.read_bytes() for path in adapter.glob("svdecode*")} == before
