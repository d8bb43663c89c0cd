"""What a report says about the answers themselves: one answer to everything is no knowledge."""

from __future__ import annotations

import math

import pytest
import torch
from evaluation_kit import LABELS, commonsense_rows, quiet, tiny_tokenizer
from tiny import tiny_lora

from svdecode.evaluation.report import usual_answers


def choosing(scores: dict[str, list[list[float]]]) -> list[dict]:
    """Records of a task with three choices, from each system's log-probs of each question."""
    count = len(next(iter(scores.values())))
    return [
        {"choices": [f" it is {label}" for label in LABELS], "logprobs": {name: v[i] for name, v in scores.items()}}
        for i in range(count)
    ]


def test_the_usual_answer_of_choices_and_of_texts():
    first, second, none = (
        [-1.0, -2.0, -3.0],
        [-2.0, -1.0, -3.0],
        ["-inf", -9.0, -math.inf],
    )  # as in a file, and as in memory
    records = choosing({"a": [first, first, second, first], "b": [second, none, second, second]})
    assert usual_answers(records, ["a", "b"]) == {
        "a": {"answer": "it is answer1", "share": 0.75},
        "b": {"answer": "it is answer2", "share": 1.0},
    }
    texts = [{"answers": {"a": text}} for text in ("yes", "no", "yes")]
    assert usual_answers(texts, ["a", "b"]) == {"a": {"answer": "yes", "share": pytest.approx(2 / 3)}}
    assert usual_answers([{"values": {}}], ["a"]) == {}  # NLL: nothing was answered


@pytest.mark.parametrize("score", ["choices", "generate"])
@torch.no_grad()
def test_a_model_that_always_says_the_same_is_named(score):
    """A bias on one label: the pre-trained model and all that is steered from it say nothing else."""
    model, tokenizer = tiny_lora(), tiny_tokenizer()
    head = model.get_base_model().lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias[tokenizer.convert_tokens_to_ids("answer2")] = 50.0
    report = quiet("arc_easy", commonsense_rows(12), model, tokenizer, mu=0.5, score=score)
    assert all(usual["share"] == 1.0 for usual in report.usual_answers.values())
    (said,) = [text for text in report.sentences() if text.startswith("Nearly all answers are")]
    assert "answer2" in said
    assert "pre-trained (100%)" in said
    assert "warm start (100%)" in said
    assert said in report.markdown()
    assert report.to_dict()["usual_answers"] == report.usual_answers


def test_different_answers_are_not_remarked_on():
    report = quiet("arc_easy", commonsense_rows(24), tiny_lora(), tiny_tokenizer(), mu=0.5, score="choices")
    report.usual_answers = {name: {"answer": "answer1", "share": 0.89} for name in report.systems}
    assert not [text for text in report.sentences() if text.startswith("Nearly all answers")]
