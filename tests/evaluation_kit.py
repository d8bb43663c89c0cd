"""A word-level tokenizer, small data sets in every format, and the command on a small app: for the tests of evaluation."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from tiny import EOS, PAD
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import svdecode
from svdecode.evaluation.run import evaluate

LABELS = ("answer1", "answer2", "answer3")
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
_KNOWN = ["Q", "A", ":", ".", "what", "is", "?", "pick", "the", "correct", "yes", "no", "true", "false", *LABELS]
WORDS = _SPECIAL + _KNOWN
WORDS += [f"w{i}" for i in range(97 - len(WORDS))]
COLUMNS = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word or mark per token, the vocabulary of the tiny models (97)."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    assert (fast.pad_token_id, fast.eos_token_id) == (PAD, EOS)
    return fast


def phrase(draw: random.Random, least: int = 1, most: int = 4) -> str:
    return " ".join(f"w{draw.randrange(60)}" for _ in range(draw.randint(least, most)))


def truthful_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows in the published columns of TruthfulQA."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        best = phrase(draw)
        true = "; ".join([phrase(draw), best, phrase(draw)][: draw.randint(2, 3)])
        false = "; ".join(phrase(draw) for _ in range(draw.randint(1, 4)))
        rows.append(dict(zip(COLUMNS, ["x", "y", f"what is w{i} w{seed} ?", best, true, false], strict=True)))
    return rows


def write_truthful(path: Path, count: int = 12, seed: int = 0) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(truthful_rows(count, seed))
    return path


def commonsense_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows in the format of LLM-Adapters."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        answer = LABELS[i % 3]
        text = f"pick the correct answer : w{i} {phrase(draw)} ? {' '.join(f'{x} {phrase(draw)}' for x in LABELS)}"
        rows.append({"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer})
    return rows


def write_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def quiet(task, data, model, tokenizer, **settings):
    """`evaluate` without a bar."""
    return evaluate(task, data, model, tokenizer, progress=False, **settings)


def calibration(model, tokenizer):
    rows = [{"prompt": f"what is w{i} ?", "completion": f" w{(7 * i) % 50} w{i}"} for i in range(30)]
    return svdecode.calibrate(model, rows, tokenizer=tokenizer, progress=False)
