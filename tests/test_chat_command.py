"""Chat data on the command line: from the warm start to a conversation through a pipe and through a terminal."""

from __future__ import annotations

import json

import pytest
from chat_kit import TALK, chat_tokenizer, message
from test_cli import cli, files_of, strict  # noqa: F401  (cli is a fixture)
from tiny import tiny_llama, tiny_lora

from svdecode.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model without a chat template, an adapter beside which a tokenizer has one, and conversations."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer("llama3")
    model = tiny_llama(vocabulary=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    chat_tokenizer("llama3", "").save_pretrained(folder / "plain")
    model.save_pretrained(folder / "plain")
    tiny_lora(vocabulary=len(tokenizer)).save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    talks = [[message("user", f"hello {i}"), message("assistant", f"I am {i}"), *TALK[2:]] for i in range(12)]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return folder


def test_from_a_warm_start_to_an_answer(cli, places, tmp_path):  # noqa: F811
    pytest.importorskip("accelerate")
    shared = ("--model", places / "model", "--data", places / "talks.jsonl")
    output = tmp_path / "lora"
    fast = ("--learning-rate", "0.01", "--batch-size", "4", "--split", "--json")
    status, out, err = cli("warmstart", *shared, "--output", output, *fast)
    assert status == 0, err
    assert strict(out)["cut_away"] == 0
    found = strict(cli("calibrate", *shared, "--adapter", output, "--json")[1])
    tokenizer = load_tokenizer(str(places / "model"))
    last = strict(cli("calibrate", *shared, "--adapter", output, "--turns", "last", "--json")[1])
    turn = tokenizer(" the quick\n brown fox ".strip() + "<|eot_id|>", add_special_tokens=False).input_ids
    assert last["num_sequences"] == found["num_sequences"] < 12  # the calibration part, with either
    assert last["num_tokens"] == len(turn) * last["num_sequences"] < found["num_tokens"]
    nll = strict(cli("eval", "--task", "nll", *shared, "--adapter", output, "--json")[1])
    assert nll["questions"] == 2 * strict(out)["splits"]["test"]
    status, out, err = cli("generate", "hello", "--chat", "--model", places / "model", "--adapter", output, "--json")
    assert status == 0, err
    assert strict(out)["prompt"].count("<bos>") == 1
