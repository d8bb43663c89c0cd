"""Judges: the protocol of an OpenAI-compatible endpoint against a server that misbehaves, a local model, verdicts in a file."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from evaluation_kit import tiny_tokenizer, truthful_rows
from tiny import tiny_llama, tiny_lora

from svdecode.evaluation.judge import Case, EndpointJudge, ModelJudge, make_judge, yes_or_no
from svdecode.evaluation.run import evaluate
from svdecode.evaluation.verdicts import read_verdicts

CASE = Case("Is w1 w2?", "w3 it is", {"true": ["w3."], "false": ["w4."]})


class Server:
    """POST /v1/chat/completions on this machine; `script(body)` gives a text, a status code, bytes or seconds to wait."""

    def __init__(self, script):
        outer = self
        self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                reply = script(body) if self.path == "/v1/chat/completions" else 404
                if isinstance(reply, float):
                    time.sleep(reply)
                    reply = "yes"
                self.send_response(reply if isinstance(reply, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                if isinstance(reply, str):
                    message = {"role": "assistant", "content": reply}
                    reply = json.dumps(
                        {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
                    ).encode()
                with contextlib.suppress(OSError):  # the client's patience was over
                    self.wfile.write(reply if isinstance(reply, bytes) else b"{}")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def in_turn(*replies):
    left = list(replies)
    return lambda body: left.pop(0)


def judge_at(server, **options):
    return EndpointJudge(server.url, "judge-1", **{"pause": 0.01, "timeout": 5.0, **options})


def test_the_protocol(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "k-123")
    with Server(in_turn("Yes.", "no, it is not")) as server:
        judge = make_judge(server.url, "judge-1", "SOME_KEY")
        assert judge.decide(CASE, "true") is True
        assert judge.decide(CASE, "informative") is False
    (path, headers, body), (_, _, second) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer k-123"
    assert headers["Content-Type"] == "application/json"
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    (message,) = body["messages"]
    assert message["role"] == "user"
    for text in ("Is w1 w2?", "w3 it is", "- w3.", "- w4.", "true"):
        assert text in message["content"]
    assert "informative" in second["messages"][0]["content"]


@pytest.mark.parametrize(
    "bad", [500, 503, 429, "perhaps", "", b"not json", b"{}", b'{"choices": []}', b"[1]", 0.6], ids=str
)
def test_what_goes_wrong_is_tried_again(bad):
    with Server(in_turn(bad, bad, "no")) as server:
        assert judge_at(server, timeout=0.3).decide(CASE, "true") is False
        assert len(server.requests) == 3
    with Server(in_turn(*[bad] * 3)) as server:
        assert judge_at(server, timeout=0.3, attempts=3).decide(CASE, "true") is None
        assert len(server.requests) == 3


def test_pauses_double(monkeypatch):
    waited = []
    monkeypatch.setattr("svdecode.evaluation.judge.time.sleep", waited.append)
    closed = EndpointJudge("http://127.0.0.1:9", "m", pause=0.5, attempts=4, timeout=1.0)  # nobody listens there
    assert closed.decide(CASE, "true") is None
    assert waited == [0.5, 1.0, 2.0]


def test_a_refusal_is_the_users_to_mend():
    with Server(lambda body: 401) as server:
        with pytest.raises(ValueError, match="refuses: 401"):
            judge_at(server).decide(CASE, "true")
        assert len(server.requests) == 1
    with pytest.raises(ValueError, match="judge-url needs judge-model"):
        make_judge("http://x", None, None)
    with pytest.raises(ValueError, match="judge-key-env needs judge-url"):
        make_judge(None, "m", "KEY")
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        make_judge("http://x", "m", "NO_SUCH_KEY")
    assert make_judge(None, None, None) is None


def test_yes_or_no():
    assert [yes_or_no(t) for t in ("Yes", " no.", "**Yes**, because", "NO\n")] == [True, False, True, False]
    assert [yes_or_no(t) for t in ("", "maybe", "I say yes", "yesterday")] == [None] * 4


def run(output=None, judge=None, verdicts=None, model=None):
    return evaluate(
        "truthfulqa_gen", truthful_rows(10), model or tiny_llama(), tiny_tokenizer(), max_new_tokens=5,
        output=output, judge=judge, verdicts=verdicts, progress=False, **({"mu": 0.5} if model else {}),
    )  # fmt: skip


def test_judged_from_end_to_end(tmp_path):
    """The judge fails on one question for good; its answers are unjudged, not wrong, and asked about again later."""
    rows = truthful_rows(10)
    stubborn = rows[7]["Question"]

    def script(body):
        text = body["messages"][0]["content"]
        if f"Question: {stubborn}" in text and broken:
            return "hm"
        return "yes" if "Is the answer true" in text else "no"

    broken = [True]
    with Server(script) as server:
        report = run(tmp_path, judge_at(server, attempts=2), model=tiny_lora())
        first = len(server.requests)
        assert set(report.unjudged.values()) == {1}
        found = report.results["true"]["warm start"]
        assert (found["mean"], found["questions"]) == (1.0, 3)
        assert report.results["true and informative"]["warm start"]["mean"] == 0.0
        assert "1 of 4 answers are unjudged" in " ".join(report.sentences())
        broken.clear()
        again = run(tmp_path, judge_at(server), model=tiny_lora())
        asked = {body["messages"][0]["content"] for _, _, body in server.requests[first:]}
        assert again.tokens == 0
        assert all(f"Question: {stubborn}" in text for text in asked)  # nothing that was known was asked again
    assert set(again.unjudged.values()) == {0}
    assert again.results["true"]["warm start"]["questions"] == 4


def test_answers_first_and_verdicts_later(tmp_path):
    unjudged = run(tmp_path / "out")
    assert unjudged.results == {}
    assert unjudged.unjudged == {"pre-trained": 4}
    assert "No judge was asked" in " ".join(unjudged.sentences())
    assert (tmp_path / "out" / "results.png").exists()
    path = tmp_path / "mine.jsonl"
    lines = [
        {"question": r["question"], "answer": r["answers"]["pre-trained"], "true": i < 3, "informative": "Yes"}
        for i, r in enumerate(unjudged.records)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = run(tmp_path / "out", verdicts=path)
    assert judged.tokens == 0
    assert judged.results["true"]["pre-trained"]["mean"] == 0.75
    assert judged.results["true and informative"]["pre-trained"]["mean"] == 0.75
    path.write_text('{"question": "a", "answer": "b", "true": "perhaps", "informative": true}\n')
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: needs"):
        read_verdicts(path)
    with pytest.raises(ValueError, match="is not a file"):
        run(verdicts=tmp_path / "missing.jsonl")


def test_a_refusal_ends_the_run_and_keeps_the_answers(tmp_path):
    with Server(lambda body: 403) as server, pytest.raises(ValueError, match="refuses: 403"):
        run(tmp_path, judge_at(server))
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 5
    assert run(tmp_path).tokens == 0


def test_a_local_model_judges():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    judge = ModelJudge(model, tokenizer)
    ids = tokenizer(f"{CASE.prompt('true')}\nReply:", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    yes, no = (tokenizer(word).input_ids[0] for word in ("yes", "no"))
    assert judge.decide(CASE, "true") is bool(logits[yes] > logits[no])
    with torch.no_grad():
        model.lm_head.weight[[yes, no]] = model.lm_head.weight[[no, yes]]
    assert judge.decide(CASE, "true") is bool(logits[yes] < logits[no])
    report = run(judge=judge)
    assert report.results["true"]["pre-trained"]["questions"] == 4
