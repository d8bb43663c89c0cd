"""What it saves to encode shared prompts once: the same answers scored both ways.

    python bench/shared_prompt.py --data truthfulqa.csv [--adapter FOLDER] [--limit 5] [--json]

With an adapter the two models are scored together, as an evaluation does; without one, the model alone.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from svdecode.common.tables import markdown_table
from svdecode.common.timing import processor_name
from svdecode.data.batches import pad_token_id
from svdecode.data.sources import read_rows
from svdecode.evaluation.items import encode_items
from svdecode.evaluation.scoring import Alone, Scorer, common_prefix
from svdecode.evaluation.systems import alone, compared
from svdecode.evaluation.tasks import find_task
from svdecode.models.adapters import causal_lm_of
from svdecode.models.loading import load_adapter, load_model
from svdecode.models.steer import steer
from svdecode.ops.setting import Setting

MU = 0.5


def shared_prompt_speed(
    data: object,
    model: object,
    tokenizer: object,
    *,
    task: str = "truthfulqa_mc",
    mu: float | None = MU,
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="TruthfulQA as a CSV file, or rows of another task")
    parser.add_argument("--task", default="truthfulqa_mc", help="one that scores choices")
    parser.add_argument("--model", help="a folder or a hub name; left out: the bundled SmolLM2-135M")
    parser.add_argument("--adapter", help="a folder with an adapter; left out: the model alone is scored")
    parser.add_argument("--limit", type=int, default=5, help="questions")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    mu = None
    if arguments.adapter is not None:
        model, mu = load_adapter(model, arguments.adapter), MU
    found = shared_prompt_speed(
        arguments.data,
        model,
        tokenizer,
        task=arguments.task,
        mu=mu,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
    )
    if arguments.json:
        print(json.dumps(found))
        return
    rows = [[name.replace("_", " "), f"{value:.4g}"] for name, value in found.items()]
    print(markdown_table(["", processor_name(model.device.type)], rows), end="")


if __name__ == "__main__":
    main()
