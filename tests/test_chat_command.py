"""Chat data on the command line: from the warm start to a conversation through a pipe and through a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from chat_kit import TALK, chat_tokenizer, message
from peft import LoraConfig, get_peft_model
from test_cli import cli, files_of, strict  # noqa: F401  (cli is a fixture)
from tiny import tiny_llama, tiny_lora

from svdecode.cli import conversation
from svdecode.models.loading import load_model, load_tokenizer


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


def generate(places, *options: object) -> list[str]:
    command = [sys.executable, "-m", "svdecode", "generate", "--chat", "--model", places / "plain"]
    return list(map(str, [*command, "--adapter", places / "adapter", "--mu", "0.5", *options]))


def test_a_conversation_through_a_pipe(cli, places):  # noqa: F811
    done = subprocess.run(
        generate(places, "--json", "--system", "be", "--max-new-tokens", "5"),
        input="hello\n\nhow are you?\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    first, second = map(strict, done.stdout.splitlines())
    assert (first["prompt"], second["prompt"]) == ("hello", "how are you?")
    tokenizer = load_tokenizer(str(places / "plain"), places / "adapter")
    talk = [message("system", "be"), message("user", "hello"), message("assistant", first["answer"])]
    talk.append(message("user", "how are you?"))
    for found, turns in ((first, talk[:2]), (second, talk)):
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert found["prompt_tokens"] == len(tokenizer(rendered, add_special_tokens=False).input_ids)
        assert 1 <= found["new_tokens"] <= 5
    once = (
        "generate",
        "hello",
        "--chat",
        "--system",
        "be",
        "--model",
        places / "plain",
        "--adapter",
        places / "adapter",
    )
    status, out, _ = cli(*once, "--mu", "0.5", "--max-new-tokens", "5")
    assert (status, out) == (0, first["answer"] + "\n")


def read_until(terminal: int, word: bytes, seconds: float = 120) -> bytes:
    found, end = b"", time.monotonic() + seconds
    while word not in found:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, found
        found += os.read(terminal, 4096)
    return found


def test_a_conversation_in_a_terminal(places):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        generate(places), stdin=theirs, stdout=subprocess.PIPE, stderr=theirs,
        # A job that a shell has put into the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        read_until(ours, b"> ")
        os.write(ours, b"hello\n")
        read_until(ours, b"> ")
        assert process.stdout.readline().endswith(b"\n")
        process.send_signal(signal.SIGINT)  # at the question: it ends, without a traceback
        rest = read_until(ours, b"\n")
        assert process.wait(60) == 130
        assert b"Traceback" not in rest
    finally:
        process.kill()
        for end in (ours, theirs):
            os.close(end)


def test_ctrl_c_ends_the_answer_and_keeps_what_is_there(cli, places, monkeypatch):  # noqa: F811
    class Terminal:
        lines = iter(["hello\n", "more\n", ""])

        def isatty(self):
            return True

        def readline(self):
            return next(self.lines)

    asked = []
    original = conversation.answer

    def interrupted(decode, tokenizer, ids, *, show):
        def stop(prompt, streamer):
            asked.append(prompt)
            streamer.put(None)
            for token in decode(prompt)[:2]:
                streamer.put(torch.tensor([token]))
            raise KeyboardInterrupt

        return original(stop, tokenizer, ids, show=show)

    monkeypatch.setattr(conversation, "answer", interrupted)
    monkeypatch.setattr(sys, "stdin", Terminal())
    status, out, _ = cli(*generate(places)[3:])
    assert status == 0
    tokenizer = load_tokenizer(None, places / "adapter")
    said = out.split("\n")[0]
    talk = [message("user", "hello"), message("assistant", said), message("user", "more")]
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(asked[1]) == rendered
    monkeypatch.setattr(Terminal, "lines", iter(["hello\n", "more\n"]))
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    assert cli(*generate(places)[3:])[0] == 130  # a pipe: the first Ctrl-C is the last


def test_the_end_of_turn_token_ends_an_answer(cli, places, tmp_path):  # noqa: F811
    model, tokenizer = load_model(str(places / "model"))
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end != model.generation_config.eos_token_id
    with torch.no_grad():  # all logits are equal but one: whatever the prompt is, <|eot_id|> follows
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(32, len(tokenizer), bias=False)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 1.0
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flat = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    flat.save_pretrained(tmp_path / "adapter")
    shared = (
        "generate",
        "hello",
        "--model",
        tmp_path / "model",
        "--adapter",
        tmp_path / "adapter",
        "--mu",
        "0",
        "--json",
    )
    found = strict(cli(*shared, "--chat")[1])
    assert (found["new_tokens"], found["answer"]) == (1, "")
    assert strict(cli(*shared)[1])["new_tokens"] == 64  # a plain prompt has no turns


MESSAGES = [
    ("talks.jsonl", ["--model", "plain"], "has no chat template"),
    ("none.jsonl", ["--model", "model"], "none.jsonl, line 1: messages has no assistant turn"),
    ("talks.jsonl", ["--model", "model", "--turns", "first"], "--turns must be one of all, last, got 'first'"),
    ("talks.jsonl", ["--model", "model", "--prompt-column", "x"], "talks.jsonl, line 1: no column 'x'"),
]


@pytest.mark.parametrize(("data", "options", "words"), MESSAGES)
@pytest.mark.parametrize("command", ["warmstart", "calibrate", "eval"])
def test_mistakes_are_one_line_before_any_work(cli, places, tmp_path, monkeypatch, command, data, options, words):  # noqa: F811
    (places / "none.jsonl").write_text(json.dumps({"messages": TALK[:1]}))
    bare = tmp_path / "bare"
    tiny_lora(vocabulary=40).save_pretrained(bare)
    before = files_of(bare)
    monkeypatch.setattr("svdecode.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    where = {
        "warmstart": ("warmstart", "--output", tmp_path / "new"),
        "calibrate": ("calibrate", "--adapter", bare),
        "eval": ("eval", "--task", "nll", "--adapter", bare, "--mu", "1", "--output", tmp_path / "new"),
    }[command]
    options = [places / word if word in ("model", "plain") else word for word in options]
    status, out, err = cli(*where, "--data", places / data, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (tmp_path / "new").exists()
    assert files_of(bare) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "a prompt is needed"),
        (["hello", "--system", "be"], "--system is a turn of --chat"),
        (["hello", "--chat", "--system", "be"], "the chat template refuses it: System role not supported"),
    ],
)
def test_mistakes_of_generate(cli, places, tmp_path, monkeypatch, options, words):  # noqa: F811
    tiny_lora(vocabulary=40).save_pretrained(tmp_path)
    chat_tokenizer("gemma").save_pretrained(tmp_path)
    monkeypatch.setattr("svdecode.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    status, out, err = cli("generate", *options, "--model", places / "model", "--adapter", tmp_path, "--mu", "1")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_the_tokenizer_beside_the_adapter(places, tmp_path):
    chat_tokenizer("gemma").save_pretrained(tmp_path)
    assert "<start_of_turn>" in load_tokenizer(str(places / "model"), tmp_path).get_vocab()
    assert "<|eot_id|>" in load_tokenizer(str(places / "model"), places).get_vocab()  # no tokenizer there
    _, tokenizer = load_model(str(places / "plain"), adapter=places / "adapter")
    assert tokenizer.chat_template
    more = chat_tokenizer("llama3")
    more.add_tokens([f"new{i}" for i in range(5)])
    more.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer in .* has \d+ tokens, the model \d+: this is not the model"):
        load_model(str(places / "model"), adapter=tmp_path)
