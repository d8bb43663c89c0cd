"""Evaluation: scores against plain forwards, shared prompts, records that survive an interruption, several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluation_kit import (
    calibration,
    commonsense_rows,
    phrase,
    quiet,
    tiny_tokenizer,
    truthful_rows,
    write_truthful,
)
from tiny import tiny_llama, tiny_lora, tiny_model, tiny_prompt, two_model_logits

import svdecode
from svdecode.evaluation.runner import Runner
from svdecode.evaluation.scoring import Alone, Scorer, common_prefix
from svdecode.evaluation.systems import System, compared, nll_of

SYSTEMS = compared(0.7, svdecode.Setting(0.0, penalty=0.0), log_ratio_mu=0.3)
PROMPT = [5, 9, 30, 31, 7, 12, 44]
ANSWERS = [[20, 21, 22], [23], [20, 24, 25, 26, 1], [40, 41]]


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def total_nll(model, prompt, answer, steered):
    """The NLL of an answer by plain forwards and plain arithmetic in float64; steered(pre, ft) gives log-probs."""
    ids = torch.tensor([prompt + answer])
    pre, ft = two_model_logits(model, ids, torch.ones_like(ids))
    logprobs = steered(pre[0].double(), ft[0].double())[len(prompt) - 1 : -1]
    return -logprobs.gather(-1, torch.tensor(answer)[:, None]).sum().item()


def by_definition(system):
    def steered(pre, ft):
        if system.pretrained:
            return pre.log_softmax(-1)
        setting = system.setting
        return svdecode.fused_steer(pre, ft, setting.mu, **setting.keywords, backend="reference").logprobs

    return steered


def test_one_forward_scores_every_system(lora):
    scorer = Scorer(svdecode.steer(lora, mu=0.0, penalty=0.0), SYSTEMS, batch_size=3)
    found = scorer.score(PROMPT, ANSWERS)
    assert found.shape == (len(SYSTEMS), len(ANSWERS))
    for row, system in zip(found, SYSTEMS, strict=True):
        for value, answer in zip(row.tolist(), ANSWERS, strict=True):
            assert value == pytest.approx(total_nll(lora, PROMPT, answer, by_definition(system)), rel=1e-4), system.name
    names = [system.name for system in SYSTEMS]
    warm = found[names.index("warm start")]
    plain = [total_nll(lora, PROMPT, answer, lambda pre, ft: ft.log_softmax(-1)) for answer in ANSWERS]
    torch.testing.assert_close(warm, torch.tensor(plain), rtol=1e-4, atol=1e-4)
    for name in set(names) - {"warm start"}:
        assert not torch.allclose(found[names.index(name)], warm, rtol=1e-3), name


MODELS = {
    "lora": tiny_lora,
    "prefix tuning": lambda: tiny_prompt("prefix tuning"),
    "prompt tuning": lambda: tiny_prompt("prompt tuning"),
    "gpt2 prompt tuning": lambda: tiny_prompt("prompt tuning", "gpt2"),
}


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_shared_prompts_give_the_same_scores(kind, batch_size):
    model = MODELS[kind]()
    steered = svdecode.steer(model, mu=0.0, penalty=0.0)
    prompts = [PROMPT, [*PROMPT[:5], 60, 61, 62, 63], [*PROMPT[:5], 70]]
    prefix = common_prefix(prompts)
    assert prefix == PROMPT[:5]
    plain = Scorer(steered, SYSTEMS, batch_size=batch_size)
    shared = Scorer(steered, SYSTEMS, prefix=prefix, batch_size=batch_size)
    for prompt in [*prompts, prompts[0]]:  # the first one again: the cache of the prefix was not written to
        torch.testing.assert_close(shared.score(prompt, ANSWERS), plain.score(prompt, ANSWERS), rtol=1e-4, atol=1e-4)
    assert shared.tokens < plain.tokens


@pytest.mark.parametrize("architecture", ["gemma2", "opt"])
def test_shared_prompts_of_two_models(architecture):
    from peft import LoraConfig, get_peft_model
    from tiny import randomise

    model = tiny_model(architecture)
    other = get_peft_model(tiny_model(architecture), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(other)
    steered = svdecode.steer(other.eval(), pretrained=model, mu=0.0, penalty=0.0)
    prompts = [PROMPT * 2, [*PROMPT, 60, 61]]  # longer than gemma2's window of 8
    shared = Scorer(steered, SYSTEMS, prefix=common_prefix(prompts))
    for prompt in prompts:
        expected = Scorer(steered, SYSTEMS).score(prompt, ANSWERS)
        torch.testing.assert_close(shared.score(prompt, ANSWERS), expected, rtol=1e-4, atol=1e-4)


def test_common_prefix_leaves_a_token_to_predict_from():
    assert common_prefix([[1, 2, 3]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 3]]) == [1]
    assert common_prefix([[1, 2, 9], [1, 5]]) == [1]
    assert common_prefix([[4, 2], [1, 2]]) == []


def test_nll_of_groups_systems_without_mixing_them_up():
    pre, ft, labels = torch.randn(5, 30), torch.randn(5, 30), torch.randint(30, (5,))
    shuffled = [SYSTEMS[i] for i in (3, 0, 5, 1, 2, 4)]
    assert len(shuffled) == len(SYSTEMS)
    whole = nll_of(shuffled, pre, ft, labels)
    for row, system in zip(whole, shuffled, strict=True):
        assert torch.equal(row, nll_of([system], pre, ft, labels)[0])


def test_truthfulqa_from_end_to_end(lora, tokenizer, tmp_path):
    data = write_truthful(tmp_path / "truthful.csv", 14)
    cal = calibration(lora, tokenizer)
    report = quiet("truthfulqa_mc", data, lora, tokenizer, mu=cal, output=tmp_path / "out")
    assert report.questions == 8  # 14 without the 6 examples
    names = [f"SVDecode ({name})" for name in cal.estimates]
    assert set(names) | {"pre-trained", "warm start", "no confidence mask"} <= set(report.systems)
    assert set(report.results) == {"MC1", "MC2", "MC3"}
    warm = [record["values"]["warm start"]["MC2"] for record in report.records]
    steered = [record["values"][names[0]]["MC2"] for record in report.records]
    found = report.comparisons["MC2"][names[0]]
    assert found["difference"] == pytest.approx(sum(steered) / 8 - sum(warm) / 8)
    assert report.results["MC2"]["warm start"]["mean"] == pytest.approx(sum(warm) / 8)
    assert any("first rows of the data" in note for note in report.notes)
    plain = quiet("truthfulqa_mc", data, lora, tokenizer, mu=cal, shared_prompt=False)
    for one, other in zip(report.records, plain.records, strict=True):
        for name, logprobs in one["logprobs"].items():
            assert logprobs == pytest.approx(other["logprobs"][name], rel=1e-4, abs=1e-4)
    assert report.tokens * 3 < plain.tokens

    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["results"] == json.loads(json.dumps(report.results))
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| warm start |" in text
    assert "SVDecode" in text
    assert (tmp_path / "out" / "results.png").read_bytes()[:4] == b"\x89PNG"
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 9
    assert [json.loads(line)["index"] for line in lines[1:]] == list(range(8))


def test_a_verdict_in_words_follows_the_interval(lora, tokenizer):
    rows = truthful_rows(14)
    report = quiet("truthfulqa_mc", rows, lora, tokenizer, mu=0.0)
    same = report.comparisons["MC2"]["SVDecode (mu = 0)"]  # mu = 0 with a penalty of 0 is the warm start
    assert same["difference"] == pytest.approx(0, abs=1e-6)
    assert same["verdict"] == "no gain is shown"
    assert report.comparisons["MC1"]["SVDecode (mu = 0)"]["mcnemar_p"] == 1.0
    assert "no gain is shown for every SVDecode strength" in " ".join(report.sentences())


def test_gains_and_losses_are_told_apart():
    from svdecode.evaluation.comparison import difference, verdict
    from svdecode.evaluation.tasks.base import Metric

    up, down = Metric("MC2"), Metric("NLL", higher_is_better=False)
    assert [verdict(up, *span) for span in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [
        "better",
        "worse",
        "no gain is shown",
    ]
    assert [verdict(down, *span) for span in ((0.1, 0.2), (-0.2, -0.1))] == ["worse", "better"]
    # A text of 1000 tokens that gets better outweighs many of 1 token that get worse.
    weights = torch.tensor([1000.0] * 5 + [1.0] * 20, dtype=torch.float64)
    changed = torch.tensor([-1.0] * 5 + [1.0] * 20, dtype=torch.float64)
    found = difference(down, changed, torch.zeros_like(changed), weights)
    assert found["difference"] == pytest.approx((-5000 + 20) / 5020)
    assert found["verdict"] == "better"


def test_without_an_adapter_the_model_alone(tokenizer, tmp_path):
    model = tiny_llama()
    report = quiet("truthfulqa_mc", truthful_rows(9), model, tokenizer, output=tmp_path)
    assert list(report.systems) == ["pre-trained"]
    assert report.comparisons == {}
    alone = Scorer(Alone(model), [System("pre-trained", None)])
    ids = torch.tensor([PROMPT + ANSWERS[0]])
    logprobs = model(ids).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1].gather(-1, ids[0, len(PROMPT) :, None])
    assert alone.score(PROMPT, ANSWERS[:1]).item() == pytest.approx(-logprobs.sum().item(), rel=1e-5)


def test_an_interrupted_run_goes_on(lora, tokenizer, tmp_path, monkeypatch):
    rows, settings = truthful_rows(14), {"mu": 0.5, "output": tmp_path / "out"}
    whole = quiet("truthfulqa_mc", rows, lora, tokenizer, mu=0.5)
    run, seen = Runner.run, []

    def stops_after_five(self, chunk):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(chunk[0].index)
        return run(self, chunk)

    monkeypatch.setattr(Runner, "run", stops_after_five)
    with pytest.raises(KeyboardInterrupt):
        quiet("truthfulqa_mc", rows, lora, tokenizer, **settings)
    path = tmp_path / "out" / "records.jsonl"
    assert len(path.read_text().splitlines()) == 6
    with path.open("a") as file:
        file.write('{"index": 5, "quest')  # what a crash leaves behind

    monkeypatch.setattr(Runner, "run", lambda self, chunk: (seen.append(chunk[0].index), run(self, chunk))[1])
    resumed = quiet("truthfulqa_mc", rows, lora, tokenizer, **settings)
    assert seen == list(range(8))  # nothing twice, nothing left out
    assert resumed.records == whole.records
    assert resumed.results == whole.results
    again = quiet("truthfulqa_mc", rows, lora, tokenizer, **settings)
    assert (len(seen), again.tokens) == (8, 0)

    with pytest.raises(ValueError, match=r"made with other settings \(systems\)"):
        quiet("truthfulqa_mc", rows, lora, tokenizer, **{**settings, "mu": 0.6})
    with pytest.raises(ValueError, match=r"other settings \(data\)"):
        quiet("truthfulqa_mc", truthful_rows(14, seed=1), lora, tokenizer, **settings)
    path.write_text(path.read_text().replace('{"index": 3', "{3", 1))
    with pytest.raises(ValueError, match=r"records\.jsonl, line 5: not a record"):
        quiet("truthfulqa_mc", rows, lora, tokenizer, **settings)


def test_a_resumed_run_samples_the_same_answers(lora, tokenizer, tmp_path, monkeypatch):
    rows = commonsense_rows(10)
    settings = {"mu": 0.5, "decodings": ["top-p"], "batch_size": 4, "max_new_tokens": 6}
    whole = quiet("arc_easy", rows, lora, tokenizer, **settings)
    quiet("arc_easy", rows, lora, tokenizer, **settings, output=tmp_path)
    path = tmp_path / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]))  # one batch and a part of the second
    resumed = quiet("arc_easy", rows, lora, tokenizer, **settings, output=tmp_path)
    assert resumed.records == whole.records
    other = quiet("arc_easy", rows, lora, tokenizer, **settings, seed=1)
    assert [r["answers"] for r in other.records] != [r["answers"] for r in whole.records]


def test_several_decodings_in_one_run(lora, tokenizer):
    report = quiet(
        "boolq", commonsense_rows(6), lora, tokenizer, mu=0.5, decodings=["greedy", "beam"], max_new_tokens=5
    )
    assert {"warm start, greedy", "warm start, beam", "SVDecode (mu = 0.5), beam"} <= set(report.systems)
    assert "the same decoding" in report.baseline
    assert set(report.comparisons["accuracy"]) == {name for name in report.systems if not name.startswith("warm")}


def test_generated_answers_are_the_models(lora, tokenizer):
    from tiny import stateless

    rows = commonsense_rows(5)
    report = quiet("arc_easy", rows, lora, tokenizer, mu=0.8, max_new_tokens=4, batch_size=3)
    for row, record in zip(rows, report.records, strict=True):
        ids = tokenizer(row["instruction"] + "\n", return_tensors="pt").input_ids
        ways = {
            "pre-trained": lambda pre, ft: pre.argmax(-1),
            "warm start": lambda pre, ft: ft.argmax(-1),
            "SVDecode (mu = 0.8)": lambda pre, ft: svdecode.fused_steer(pre, ft, 0.8).logprobs.argmax(-1),
        }
        for name, choose in ways.items():
            tokens = stateless(lora, ids, torch.ones_like(ids), 4, choose)[0, ids.shape[1] :]
            assert record["answers"][name] == tokenizer.decode(tokens, skip_special_tokens=True).strip(), name


def test_nll_of_texts_and_of_pairs(lora, tokenizer, tmp_path):
    import random

    text = tmp_path / "words.txt"
    words = phrase(random.Random(0), 700, 700)
    text.write_text(words)
    report = quiet("nll", text, lora, tokenizer, mu=0.5, batch_size=1)
    assert [record["weight"] for record in report.records] == [127] * 5 + [59]  # windows of 128: what the model takes
    ids = tokenizer(words).input_ids[640:]
    expected = total_nll(lora, ids[:1], ids[1:], lambda pre, ft: ft.log_softmax(-1)) / 59
    assert report.records[5]["values"]["warm start"]["NLL"] == pytest.approx(expected, rel=1e-4)
    means = [r["values"]["warm start"]["NLL"] for r in report.records]
    assert report.results["NLL"]["warm start"]["mean"] == pytest.approx((127 * sum(means[:5]) + 59 * means[5]) / 694)
    assert "perplexity" in report.markdown()

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "what is w1 ?", "completion": " w2 w3"}\n{"prompt": "w5", "completion": "w6"}\n')
    found = quiet("nll", pairs, lora, tokenizer, mu=0.5).records
    prompt, answer = tokenizer("what is w1 ?").input_ids, [*tokenizer("w2 w3").input_ids, tokenizer.eos_token_id]
    expected = total_nll(lora, prompt, answer, lambda pre, ft: ft.log_softmax(-1)) / 3
    assert found[0]["values"]["warm start"]["NLL"] == pytest.approx(expected, rel=1e-4)
    assert [r["weight"] for r in found] == [3, 2]

    rows = [{"instruction": "what is w1 ?", "output": " w2 w3", "answer": "w2"}]
    same = quiet("nll", rows, lora, tokenizer, mu=0.5).records  # and what else a warm start reads
    assert same[0]["values"]["warm start"]["NLL"] == pytest.approx(expected, rel=1e-4)
    for broken, words in (
        ([{"question": "w1"}], "data for nll need a column text, or prompt and completion, got"),
        ([{"prompt": ["w1"], "completion": ["w2"]}], "row 1: prompt, message 1: role and content are needed, got 'w1'"),
    ):
        with pytest.raises(ValueError, match=words):
            quiet("nll", broken, lora, tokenizer, mu=0.5)
    with pytest.raises(ValueError, match="data for nll, row 1: no 'completion'"):
        quiet("nll", [{"prompt": "w1", "completion": " "}], lora, tokenizer, mu=0.5)


def test_the_speed_of_a_shared_prompt_is_measured_on_equal_scores(lora, tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    from shared_prompt import shared_prompt_speed

    found = shared_prompt_speed(truthful_rows(12), lora, tokenizer, limit=None)
    assert found["questions"] == 6
    assert found["largest_difference"] < 1e-4
    assert found["shared_tokens"] * 3 < found["anew_tokens"]
    assert found["factor"] == pytest.approx(found["anew_seconds"] / found["shared_seconds"])
