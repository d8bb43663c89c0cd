"""`explain`: its numbers against two models that keep nothing, what it refuses, and the command."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import torch
from evaluation_kit import tiny_tokenizer
from explanations import HOSTILE, byte_tokenizer, hostile_explanation
from test_cli import adapter, cli, small_disk, strict  # noqa: F401  (fixtures)
from test_demo import tiny_model  # noqa: F401  (fixture)
from tiny import EOS, tiny_llama, tiny_lora, two_model_logits
from tokenizers import processors

import svdecode

MU = 1.7
PROMPT = [5, 6, 7, 8]
SETTINGS = [
    {"alpha": 0.02, "penalty": -math.inf, "direction": "kl"},
    {"alpha": 0.0, "penalty": -math.inf, "direction": "log_ratio"},
    {"alpha": 0.1, "penalty": -1.0, "direction": "log_ratio"},
    {
        "alpha": 1.0,
        "penalty": -math.inf,
        "direction": "kl",
    },  # lazy decoding needs no pre-trained model here, the page does
]
CLOSE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


def recomputed(pre, ft, alpha, penalty, direction, mu=MU):
    """Both distributions, the steered one, K and the KL of one row, by the formulas of the paper in float64."""
    a, z = pre.double(), ft.double()
    p, d = z.softmax(-1), z - a
    c = d - (p * d).sum()
    kept = z >= z.max() + (math.log(alpha) if alpha else -math.inf)
    steered = torch.where(kept, z + mu * (p * c if direction == "kl" else c), z + abs(mu) * penalty).softmax(-1)
    return a.softmax(-1), p, steered, kept, (p * (p.log() - a.log_softmax(-1))).sum()


def check(found, pre, ft, setting):
    """Every number of every step; logits (T, V) of whole forwards over the prompt and the answer."""
    for index, step in enumerate(found.steps):
        row = len(PROMPT) - 1 + index
        before, warm, steered, kept, kl = recomputed(pre[row], ft[row], **setting)
        assert (step.chosen.token.id, step.without.token.id) == (steered.argmax(), warm.argmax())
        assert step.kl == pytest.approx(kl.item(), **CLOSE)
        assert step.num_kept == kept.sum()
        assert step.changed == (steered.argmax() != warm.argmax())
        assert step.moved == pytest.approx((steered - warm)[steered.argmax()].item(), **CLOSE)
        ids = [row.token.id for row in step.candidates]
        assert len(set(ids)) == len(ids)
        for distribution in (before, warm, steered):
            assert set(distribution.topk(3).indices.tolist()) <= {
                *ids,
                *(distribution == 0).nonzero().flatten().tolist(),
            }
        for candidate in step.candidates:
            token = candidate.token.id
            assert candidate.kept == kept[token]
            values = (candidate.pretrained, candidate.warm_start, candidate.steered)
            assert values == pytest.approx([one[token].item() for one in (before, warm, steered)], **CLOSE)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", ["paired", "lazy", "two_pass"])
def test_numbers_equal_a_recompute_and_tokens_generate(lora, mode, setting):
    infinite = {**setting, "penalty": -math.inf} if mode == "lazy" else setting
    steered = svdecode.steer(lora, mu=MU, mode=mode, **infinite)
    steered.settings = svdecode.Setting(MU, **setting)  # a finite penalty may be assigned in lazy mode
    before = steered.settings
    found = svdecode.explain(steered, PROMPT, max_new_tokens=12)
    assert steered.settings == before == found.setting
    assert found.mode == mode
    ids = torch.tensor([PROMPT])
    assert found.token_ids == steered.generate(ids, max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    assert found.token_ids == svdecode.generate(steered, ids, max_new_tokens=12)[0, len(PROMPT) :].tolist()
    plain = svdecode.generate(svdecode.steer(lora, mu=0.0), ids, max_new_tokens=12)[0, len(PROMPT) :].tolist()
    assert [token.id for token in found.unsteered] == plain
    whole = torch.tensor([PROMPT + found.token_ids])
    pre, ft = two_model_logits(lora, whole, torch.ones_like(whole))
    check(found, pre[0], ft[0], setting)
    assert found.changed_steps or setting["direction"] == "kl"  # or the comparison would say little
    assert found.first_difference == (found.changed_steps[0] if found.changed_steps else None)


def test_two_plain_models():
    pre, ft = tiny_llama(seed=1), tiny_llama()
    found = svdecode.explain(svdecode.steer(ft, pretrained=pre, mu=MU, **SETTINGS[0]), PROMPT, max_new_tokens=8)
    whole = torch.tensor([PROMPT + found.token_ids])
    with torch.no_grad():
        check(found, *(one(whole, use_cache=False).logits[0] for one in (pre, ft)), SETTINGS[0])


def test_the_token_that_ends_an_answer_is_its_last_step(lora):
    steered = svdecode.steer(lora, mu=MU, **SETTINGS[0])
    free = svdecode.explain(steered, PROMPT, max_new_tokens=8).token_ids
    steered.generation_config.eos_token_id = [EOS, free[3]]
    assert (
        svdecode.explain(steered, torch.tensor(PROMPT), max_new_tokens=8).token_ids == free[: free.index(free[3]) + 1]
    )


def test_without_steering_nothing_changes(lora):
    found = svdecode.explain(svdecode.steer(lora, mu=0.0, alpha=0.0), torch.tensor([PROMPT]), max_new_tokens=6)
    assert found.changed_steps == []
    assert found.first_difference is None
    assert found.summary() == "Steering changed the choice at none of 6 steps: the answer is the warm start's."
    assert all(step.moved == pytest.approx(0.0, abs=1e-6) for step in found.steps)


def test_a_prompt_as_text_is_read_as_generate_reads_it(lora):
    """What a tokenizer appends ends no prompt."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert tokenizer("what is w1").input_ids[-1] == tokenizer.eos_token_id
    found = svdecode.explain(svdecode.steer(lora, mu=MU), "what is w1", tokenizer, max_new_tokens=2)
    assert found.prompt_ids == tokenizer("what is w1", add_special_tokens=False).input_ids


def test_what_is_refused(lora):
    steered = svdecode.steer(lora, mu=MU)
    tokenizer = byte_tokenizer()
    wrong = [
        ((lora, PROMPT), TypeError, "steered must come from svdecode.steer, got PeftModel"),
        ((steered, "text"), ValueError, "a prompt as text needs its tokenizer"),
        ((steered, "text", "name"), TypeError, "tokenizer must be a tokenizer of transformers, got str"),
        ((steered, "", tokenizer), ValueError, "an empty prompt"),
        ((steered, []), ValueError, "an empty prompt"),
        ((steered, [5, 97]), ValueError, "the token 97, which is outside the vocabulary of 97"),
        ((steered, [-1]), ValueError, "the token -1, which is outside"),
        ((steered, torch.ones(2, 3, dtype=torch.long)), ValueError, r"one prompt, int64 .* shape \(2, 3\)"),
        ((steered, torch.ones(3)), ValueError, "got torch.float32"),
        ((steered, 5), TypeError, "got int"),
        (
            (steered, [5] * 100),
            ValueError,
            "max_new_tokens=64 after a prompt of 100 tokens is more than the model's 128",
        ),
    ]
    for arguments, kind, message in wrong:
        with pytest.raises(kind, match=message):
            svdecode.explain(*arguments)
    with pytest.raises(ValueError, match="max_new_tokens must be a positive integer, got 0"):
        svdecode.explain(steered, PROMPT, max_new_tokens=0)
    assert steered.mu == MU


def test_the_numbers_as_json(lora, tmp_path):
    steered = svdecode.steer(lora, mu=MU, **SETTINGS[0])
    found = svdecode.explain(steered, PROMPT, max_new_tokens=4)
    values = found.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert (values["token_ids"], values["prompt_ids"], values["mu"]) == (found.token_ids, PROMPT, MU)
    assert [step["step"] for step in values["steps"]] == [1, 2, 3, 4]
    assert values["steps"][0]["chosen"]["steered"] == found.steps[0].chosen.steered
    assert repr(found) == f"Explanation(4 steps, changed {found.changed_steps}, mu=1.7)"
    assert found.to_html(tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")


@pytest.fixture
def arguments(tiny_model, adapter):  # noqa: F811
    return (
        "explain",
        "what is w3 ?",
        "--model",
        tiny_model,
        "--adapter",
        adapter,
        "--mu",
        "1.5",
        "--max-new-tokens",
        "4",
    )


def test_the_command_writes_a_page_and_says_what_changed(cli, arguments, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    status, out, err = cli(*arguments, "--direction", "log_ratio", "--alpha", "0")
    assert status == 0, err
    assert "Steering changed the choice at" in out
    assert out.endswith("page: svdecode-explanation.html\n")
    page = tmp_path / "svdecode-explanation.html"
    assert "<dd>log_ratio</dd>" in page.read_text()

    page.write_text("mine")
    monkeypatch.setattr("svdecode.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert cli(*arguments) == (
        2, "", "svdecode: svdecode-explanation.html is there already: pass --overwrite, or another file as --output\n"
    )  # fmt: skip
    assert page.read_text() == "mine"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli(*arguments, "--overwrite")[0] == 0
    assert page.read_text() != "mine"


def test_the_commands_numbers(cli, arguments, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    found = strict(cli(*arguments, "--json")[1])
    assert list(tmp_path.glob("*.html")) == []  # it was not asked for
    assert (found["mu"], found["penalty"], len(found["prompt_ids"])) == (1.5, "-inf", 4)
    generated = strict(cli("generate", *arguments[1:], "--json")[1])
    assert (found["answer"].split(), len(found["steps"])) == (generated["answer"].split(), generated["new_tokens"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"what is w3 ?\n")))
    again = strict(cli("explain", "-", *arguments[2:], "--json", "--output", "page.html")[1])
    assert again == found
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--output", "{folder}"), "is a folder: name a file"),
        (("--output", "{folder}/file/page.html"), "file cannot be written: Not a directory"),
        (("--alpha", "2"), "alpha must be in"),
        (("--direction", "up"), "direction must be one of kl, log_ratio, got 'up'"),
        (("--penalty", "1"), "penalty must be in"),
        (("--mu", "inf"), "mu must be finite"),
        (("--adapter", "nowhere"), "nowhere is not an adapter folder"),
        (("--max-new-tokens", "0"), "max_new_tokens must be a positive integer"),
        (("--max-new-tokens", "125"), "more than the model's 128 positions"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(cli, arguments, tmp_path, monkeypatch, more, message):  # noqa: F811
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    status, out, err = cli(*arguments, *(part.format(folder=tmp_path) for part in more))
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert list(tmp_path.rglob("*.html")) == []


def test_an_empty_prompt_and_a_full_disk(cli, arguments, tmp_path, monkeypatch, small_disk):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert cli("explain", "", *arguments[2:]) == (2, "", "svdecode: the prompt is empty\n")
    monkeypatch.setattr("svdecode.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    small_disk(100)
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert "cannot be written: File too large" in err
    assert list(tmp_path.glob("*.html")) == []


def test_hostile_texts_reach_the_terminal_without_their_controls(capsys):
    from svdecode.cli.explain import _show

    _show(hostile_explanation())
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\u27e8U+001B\u27e9" in out
    assert HOSTILE[0] in out
