"""`svdecode serve` as a process of its own: vLLM's OpenAI server over HTTP."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import kit
import pytest
import torch

from svdecode.serving.names import MU

MUS = (0.7, 2.0, -1.0, 0.3)
DEADLINE = 300  # seconds


class Server:
    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [
            sys.executable, "-c", "from svdecode.cli.app import main; main()", "serve", str(folder),
            "--adapter", str(folder / "lora"), "--mu", str(kit.MU), "--port", str(self.port), "--host", "127.0.0.1",
            "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--max-num-batched-tokens", "64",
            "--block-size", "32", "--enforce-eager", "--served-model-name", "tiny",
        ]  # fmt: skip
        self.log = folder.parent / "server.log"
        self.start()

    def start(self):
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TORCHDYNAMO_DISABLE": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + DEADLINE
        while True:
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the server did not start: {self.log.read_text()[-3000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            time.sleep(0.5)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def open(self, path, **body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=DEADLINE)

    def ask(self, path, **body):
        with self.open(path, **body) as answer:
            return json.load(answer)

    def complete(self, prompt, mu=None, **options):
        own = {} if mu is None else {"vllm_xargs": {MU: mu}}
        body = {
            "prompt": prompt, "temperature": 0, "max_tokens": kit.NEW, "ignore_eos": True, "return_token_ids": True,
            "skip_special_tokens": False, **own, **options,
        }  # fmt: skip
        return self.ask("/v1/completions", model="tiny", **body)["choices"][0]


@pytest.fixture(scope="module")
def folder(models):
    return kit.tiny(models, "llama")


@pytest.fixture(scope="module")
def server(folder):
    found = Server(folder)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def wanted(folder):
    """By prompt and strength: what transformers decodes."""
    steered, found = kit.in_transformers(folder), {}
    for mu in MUS:
        steered.mu = mu
        for place, prompt in enumerate(kit.prompts()):
            found[place, mu] = kit.reference(steered, prompt)
    return found


def test_completions(server, wanted):
    for place, prompt in enumerate(kit.prompts()):
        choice = server.complete(prompt, logprobs=2)
        tokens, kept = wanted[place, kit.MU]
        assert choice["token_ids"] == tokens
        assert choice["text"].split() == [kit.word(token) for token in tokens]
        given = choice["logprobs"]["token_logprobs"]
        assert given == pytest.approx([row[token] for row, token in zip(kept, tokens, strict=True)], abs=1e-4)


def chat(**options):
    text = " ".join(map(kit.word, kit.prompts()[1]))
    message = {"role": "user", "content": text}
    return {"model": "tiny", "messages": [message], "temperature": 0, "max_tokens": 8, "ignore_eos": True,
            "skip_special_tokens": False, **options}  # fmt: skip


def test_chat_with_log_probs_and_as_a_stream(server, folder):
    answer = server.ask("/v1/chat/completions", **chat(logprobs=True, top_logprobs=3))["choices"][0]
    tokens, kept = kit.reference(kit.in_transformers(folder), [*kit.prompts()[1], 4], 8)
    assert answer["message"]["content"].split() == [kit.word(token) for token in tokens]
    given = [entry["logprob"] for entry in answer["logprobs"]["content"]]
    assert given == pytest.approx([row[token] for row, token in zip(kept, tokens, strict=True)], abs=1e-4)

    pieces = []
    with server.open("/v1/chat/completions", **chat(stream=True)) as stream:
        for line in stream:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                pieces += [choice["delta"].get("content") or "" for choice in json.loads(data)["choices"]]
    assert len(pieces) > 4
    assert "".join(pieces) == answer["message"]["content"]


def test_a_request_has_its_own_strength(server, wanted):
    prompt = kit.prompts()[2]
    for mu in MUS:
        assert server.complete(prompt, mu)["token_ids"] == wanted[2, mu][0]
    assert server.complete(prompt)["token_ids"] == wanted[2, kit.MU][0]


def test_beams_that_would_lose_their_strength(server):
    beams = {"use_beam_search": True, "n": 2, "best_of": 2}
    with pytest.raises(urllib.error.HTTPError) as error:
        server.complete(kit.prompts()[0], mu=0.3, **beams)
    assert error.value.code == 400
    assert "beams have the server's own strength" in error.value.read().decode()
    assert server.complete(kit.prompts()[0], **beams)["token_ids"] is not None


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({MU: "strong"}, "svdecode_mu must be a finite number, got 'strong'"),
        ({"svdecode_alpha": 0.5}, "svdecode_alpha is unknown"),
    ],
)
def test_a_bad_strength_is_status_400_and_a_sentence(server, extra, words):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.ask("/v1/completions", model="tiny", prompt=kit.prompts()[0], vllm_xargs=extra)
    assert caught.value.code == 400
    assert words in caught.value.read().decode()
    assert server.complete(kit.prompts()[0])["token_ids"]


def test_many_at_a_time(server, wanted):
    """64 requests, four strengths, more than there are places."""
    asked = [(place % 7, MUS[place % len(MUS)]) for place in range(64)]
    inputs = kit.prompts()
    with concurrent.futures.ThreadPoolExecutor(64) as threads:
        found = list(threads.map(lambda one: server.complete(inputs[one[0]], one[1])["token_ids"], asked))
    assert found == [wanted[one][0] for one in asked]


def test_a_grammar(server, folder):
    """Words that steering would not choose: the adapted model's order decides between them."""
    prompt = kit.prompts()[1]
    ids = torch.tensor([prompt])
    steered = kit.in_transformers(folder)(input_ids=ids).logits[0, -1]
    adapted = kit.in_transformers(folder, alpha=0.0, mu=0.0)(input_ids=ids).logits[0, -1]
    words = (17, 23)
    assert all(steered[word] == -math.inf for word in words)
    choice = server.complete(
        prompt, structured_outputs={"choice": [kit.word(word) for word in words]}, ignore_eos=False
    )
    assert choice["text"].split()[0] == kit.word(max(words, key=lambda word: adapted[word].item()))


def test_a_client_that_leaves(server, wanted):
    stream = server.open(
        "/v1/completions", model="tiny", prompt=kit.prompts()[1], max_tokens=240, ignore_eos=True, stream=True
    )
    assert stream.readline()
    stream.close()
    end = time.monotonic() + 60
    while running(server):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert server.complete(kit.prompts()[1])["token_ids"] == wanted[1, kit.MU][0]


def running(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_a_server_that_is_killed_and_started_again(server, wanted):
    server.stop()
    server.start()
    assert server.complete(kit.prompts()[3], 2.0)["token_ids"] == wanted[3, 2.0][0]
