"""The command line and the demo, from end to end, on a tiny model and a tiny task."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from countryinfo import all_countries
from tiny import EOS, PAD, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from svdecode.data.splits import Splits
from svdecode.demo.facts import TEMPLATES, country_facts
from svdecode.demo.report import meaning
from svdecode.demo.run import _Cache
from svdecode.demo.run import run as demo
from svdecode.evaluation.comparison import verdict
from svdecode.evaluation.tasks.base import Metric
from svdecode.ops import compiled

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "what", "is", "?", "answer"] + [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    assert (fast.pad_token_id, fast.eos_token_id) == (PAD, EOS)
    fast.save_pretrained(folder)
    tiny_llama(vocabulary=len(WORDS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"what is w{i} ?", "completion": f"w{(7 * i) % 40} w{i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "svdecode", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Path:
    """Ten prompts, four times each with different completions."""
    path = tmp_path_factory.mktemp("twins") / "pairs.jsonl"
    rows = [
        {"prompt": f"what is w{i} ?", "completion": f"w{(7 * i + j) % 40} w{i}"} for j in range(4) for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_demo_runs_caches_and_reports(tiny_model, twins, tmp_path):
    output = tmp_path / "out"
    arguments = ("demo", "--model", tiny_model, "--data", twins, "--output", output)
    first = run(*arguments, "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["examples"] == {"train": 24, "calibration": 8, "test": 8}
    assert [row["step"] for row in report["steps"]] == [6]
    assert report["steps"][0]["nll_difference"]["interval"]
    assert set(report["exact_match"]) == {"pre-trained", "warm start", "SVDecode"}
    for found in (report["held_out"]["nll_difference"], report["exact_match_difference"]):
        assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert all(speed > 0 for speed in report["tokens_per_second"].values())
    assert Path(report["figure"]).read_bytes()[:4] == b"\x89PNG"
    assert json.loads((output / "adapter" / "svdecode.json").read_text())["mu"] == report["mu"]
    assert json.loads((output / "demo.json").read_text()) == report
    weights = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    # Equal prompts are in one part: the answered questions were not trained on.
    assert len(report["samples"]) == 3
    assert Splits.load(output / "adapter").seen_in_training(report["samples"]) == 0

    second = run(*arguments)
    assert second.returncode == 0, second.stderr
    assert "answers differ" in second.stdout
    assert second.stdout.rstrip().endswith("points).")
    assert "step/s" in first.stderr
    assert "step/s" not in second.stderr  # no training bar: the saved adapter was taken
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    again = json.loads((output / "demo.json").read_text())
    assert again["mu"] == pytest.approx(report["mu"])
    assert again["steps"] == report["steps"]
    assert again["held_out"]["coverage"] == pytest.approx(report["held_out"]["coverage"])
    assert again["held_out"]["nll"] == pytest.approx(report["held_out"]["nll"])
    last = again["steps"][-1]  # the last checkpoint is the adapter
    assert last["nll"] == pytest.approx(again["held_out"]["nll"], rel=1e-4)
    for name in ("warm start", "SVDecode"):
        assert last["metric"][name]["mean"] == pytest.approx(again["nll_all_tokens"][name]["mean"], rel=1e-4)

    # An adapter of one's own keeps the parts of its warm start, whatever the seed; nothing is written beside it.
    before = sorted(output.rglob("*"))
    other = demo(
        model=str(tiny_model), data=twins, adapter=output / "adapter", output=tmp_path / "b", seed=3, progress=False
    )
    assert other["steps"] == []
    assert Splits.load(output / "adapter").seen_in_training(other["samples"]) == 0
    assert other["held_out"]["nll"] == pytest.approx(again["held_out"]["nll"], rel=1e-4)
    assert sorted(output.rglob("*")) == before
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"demo.json", "demo.png"}


class Enough(Exception):
    """What is to be seen has been seen."""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equal_prompts_stay_in_one_part(seed, tiny_model, twins, tmp_path, monkeypatch):
    seen = {}

    def train(base, tokenizer, rows, folder, *, splits, **_):
        seen["train"] = splits.select(rows, "train")

    def estimate(model, rows, *, held_out, **_):
        seen.update(calibration=rows, test=held_out)
        raise Enough

    monkeypatch.setattr("svdecode.demo.run.warmstart", train)
    monkeypatch.setattr("svdecode.demo.run.calibrate", estimate)
    with pytest.raises(Enough):
        demo(model=str(tiny_model), data=twins, output=tmp_path, seed=seed, progress=False)
    assert sorted(map(len, seen.values())) == [8, 8, 24]
    prompts = [{row["prompt"] for row in rows} for rows in seen.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 10


def test_what_another_run_left_is_not_taken(tmp_path):
    rows = [{"prompt": f"w{i}", "completion": "w1"} for i in range(10)]
    path = tmp_path / "demo-cache.json"
    cache = _Cache(path, None, rows, Splits.make(rows))
    cache.keep("adapter", True)
    cache.keep("steps", [1])
    assert _Cache(path, None, rows, Splits.make(rows)).values["steps"] == [1]
    others = [
        ("model", rows, Splits.make(rows)),
        (None, rows, Splits.make(rows, seed=1)),
        (None, rows[1:], Splits.make(rows[1:])),
    ]
    for other in others:
        fresh = _Cache(path, *other)
        assert not fresh.holds("adapter")
        assert not fresh.holds("steps")
    fresh.keep("adapter", True)  # the new adapter is there, the old one's steps are not its own
    assert not _Cache(path, *others[-1]).holds("steps")


def test_no_country_is_in_two_parts(tmp_path):
    rows, splits = country_facts(0, None, bundled=True)
    assert splits.sizes == {"train": 192, "calibration": 96, "test": 120}
    texts = ["".join(row["prompt"] for row in splits.select(rows, name)) for name in splits.parts]
    countries = {country.info()["name"] for country in all_countries()}
    questions = [[template.format(country=name) for template in TEMPLATES.values()] for name in countries]
    places = [sum(any(question in text for question in asked) for text in texts) for asked in questions]
    assert max(places) == 1
    assert sum(places) > 100
    splits.save(tmp_path)
    assert Splits.load(tmp_path).parts == splits.parts


@pytest.mark.parametrize(
    ("nll", "match", "words", "never"),
    [
        ((-0.3, -0.1), (0.02, 0.09), ["more probable", "more of them exactly right"], ["difference"]),
        ((0.1, 0.3), (-0.09, -0.02), ["less probable", "fewer of them exactly right"], ["more", "difference"]),
        ((-0.1, 0.3), (-0.01, 0.05), ["No difference is shown", "no difference is shown"], ["more", "less", "fewer"]),
    ],
)
def test_the_sentence_claims_what_the_intervals_show(nll, match, words, never):
    def found(ends, higher):
        word = verdict(Metric("", higher_is_better=higher), *ends)
        return {"difference": sum(ends) / 2, "interval": list(ends), "verdict": word}

    said = meaning({
        "examples": {"test": 120}, "held_out": {"nll_difference": found(nll, False)},
        "exact_match_difference": found(match, True),
    })  # fmt: skip
    assert all(word in said for word in words), said
    assert not any(word in said for word in never), said
    assert f"[{nll[0]:+.3f}, {nll[1]:+.3f}]" in said
    assert f"[{100 * match[0]:+.1f}, {100 * match[1]:+.1f}] points" in said


def test_warmstart_calibrate_generate(tiny_model, examples, tmp_path):
    adapter = tmp_path / "adapter"
    shared = ("--model", tiny_model)
    trained = run("warmstart", *shared, "--data", examples, "--output", adapter, "--learning-rate", "1e-2")
    assert trained.returncode == 0, trained.stderr
    early = run("generate", "what is w3 ?", *shared, "--adapter", adapter)
    assert early.returncode == 2
    assert "svdecode.json is missing" in early.stderr
    calibrated = run(
        "calibrate", *shared, "--data", examples, "--adapter", adapter, "--json", "--plot", tmp_path / "c.png"
    )
    assert calibrated.returncode == 0, calibrated.stderr
    assert set(json.loads(calibrated.stdout)["estimates"]) == {"mean", "median", "trimmed", "ratio", "newton", "exact"}
    assert (tmp_path / "c.png").exists()
    answered = run("generate", "what is w3 ?", *shared, "--adapter", adapter, "--max-new-tokens", "4")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()


def test_info():
    found = json.loads(run("info", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"]
    assert found["backends"]["reference"]["available"]
    assert found["backends"]["cuda"]["available"] == (compiled.CUDA_IS_EMULATED or torch.cuda.is_available())
    assert found["backends"]["cuda"]["reason"]
    assert "reference" in run("info").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--data", "missing.jsonl"], "missing.jsonl is not a file"),
        (["demo", "--model", "no/such-model"], "cannot load the model no/such-model"),
        (["demo", "--model", "."], "config.json is missing"),
        (["calibrate", "--data", "{data}", "--adapter", ".", "--model", "{model}"], "adapter_config.json is missing"),
        (
            ["calibrate", "--data", "{data}", "--adapter", ".", "--model", "{model}", "--alpha", "2"],
            "adapter_config|alpha",
        ),
        (["generate", "hi", "--adapter", "nowhere"], "no calibration in nowhere"),
        (["warmstart", "--data", "{empty}", "--output", "o"], "data is empty"),
        (["warmstart", "--data", "{broken}", "--output", "o"], "line 2: not JSON"),
        (["demo", "--nonsense"], "No such option"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, words, tiny_model, examples, tmp_path):
    import re

    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    places = {
        "model": tiny_model,
        "data": examples,
        "empty": tmp_path / "empty.jsonl",
        "broken": tmp_path / "broken.jsonl",
    }
    result = subprocess.run(
        [sys.executable, "-m", "svdecode", *(a.format(**places) for a in arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 2
    assert re.search(words, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
