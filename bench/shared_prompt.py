"""What it saves to encode shared prompts once: the same answers scored both ways.

python bench/shared_prompt.py --data truthfulqa.csv [--adapter FOLDER] [--limit 5]
"""

from __future__ import annotations

import time

import torch

from svdecode.data.batches import pad_token_id
from svdecode.data.sources import read_rows
from svdecode.evaluation.items import encode_items
from svdecode.evaluation.scoring import Alone, Scorer, common_prefix
from svdecode.evaluation.systems import alone, compared
from svdecode.evaluation.tasks import find_task
from svdecode.models.adapters import causal_lm_of
from svdecode.models.steer import steer
from svdecode.ops.setting import Setting


def shared_prompt_speed(
    data: object,
    model: object,
    tokenizer: object,
    *,
    task: str = "truthfulqa_mc",
    mu: float | None = 0.5,
    limit: int | None = 5,
    batch_size: int = 8,
) -> dict[str, float]:
    """Seconds to score a task's choices with the shared prompt encoded once and with all prompts encoded anew.

    Args:
        data: as in `svdecode.evaluation.run.evaluate`, and so are `tokenizer`, `limit` and `batch_size`.
        model: a PeftModel; or a model alone, with mu=None.
        task: one that scores choices.
        mu: strength; None scores the model alone.

    Returns:
        "questions", "shared_seconds" (with the encoding of the prompt), "anew_seconds", "factor", "shared_tokens" and
        "anew_tokens" that went through the model, and "largest_difference" of any answer's log-prob (nats).
    """
    chosen = find_task(task, None if task.startswith("truthfulqa") else "choices")
    items = encode_items(chosen, chosen.questions(read_rows(data), None), tokenizer, limit)
    systems = alone() if mu is None else compared(mu, Setting(mu, penalty=0.0))
    pair = Alone(causal_lm_of(model)) if mu is None else steer(model, mu=mu, penalty=0.0)
    found: dict[str, float] = {"questions": len(items)}
    scores = {}
    for way in ("shared", "anew"):
        start = time.perf_counter()
        prefix = common_prefix([item.prompt for item in items]) if way == "shared" else []
        scorer = Scorer(pair, systems, prefix=prefix, batch_size=batch_size, pad=pad_token_id(tokenizer))
        scores[way] = torch.cat([scorer.score(item.prompt, item.answers).flatten() for item in items])
        found[f"{way}_seconds"] = time.perf_counter() - start
        found[f"{way}_tokens"] = scorer.tokens
    found["factor"] = found["anew_seconds"] / found["shared_seconds"]
    found["largest_difference"] = (scores["shared"] - scores["anew"]).abs().max().item()
    return found
