"""What the steering arithmetic of calibration costs, against the forwards of both models, on the bundled SmolLM2-135M.

    OMP_NUM_THREADS=1 python bench/calibration.py [--batches 4] [--batch-size 8] [--length 64] [--prompt 16] [--json]

A LoRA with random weights lies on the attention projections; the text is random tokens, which keep some tens of tokens a
position, more than real answers do. For each batch: seconds inside the forward of both models, and in everything else that
one reading does: for the paper's setting alone, and for it and the six families of the fair table. Then the seconds of all
estimates, intervals and gains for 50,000 tokens of 5,000 sequences, and what that adds to the share, since calibration ends
with it. Medians over the batches, the first one left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model

from svdecode.calibration.statistics import batch_statistics, gold_rows
from svdecode.constants import ALPHA, KL
from svdecode.models.loading import BUNDLED_NAME, load_model
from svdecode.models.steer import steer
from svdecode.strength.calibration import Calibration
from svdecode.strength.fair_table import compared
from svdecode.strength.family import Family
from svdecode.strength.nll_curve import NLLCurve
from svdecode.strength.token_statistics import GoldTokens, TokenStatistics

ATTENTION_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOKENS, TOKENS_A_SEQUENCE = 50_000, 10


class Timed:
    """A steered model that remembers how long its forwards took."""

    def __init__(self, steered: object) -> None:
        self.steered, self.device, self.forward, self.seconds = steered, steered.device, steered.forward, 0.0

    def pair_logits(self, **inputs: object) -> tuple:
        """The steered model's own, timed."""
        start = time.perf_counter()
        found = self.steered.pair_logits(**inputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - start
        return found


def batch_of(size: int, length: int, prompt: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens, the prompt of each row unlabelled."""
    ids = torch.randint(vocabulary, (size, length))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def of_batches(steered: Timed, arguments: argparse.Namespace) -> tuple[list[dict], GoldTokens]:
    """Seconds for each batch, and the gold tokens of the last one."""
    rows = []
    grids = {family: family.coarse() for family in [Family(), *compared()]}
    for _ in range(arguments.batches + 1):
        batch = batch_of(arguments.batch_size, arguments.length, arguments.prompt, steered.steered.config.vocab_size)
        start = time.perf_counter()
        logits = gold_rows(steered, batch)
        prepared = time.perf_counter() - start - steered.seconds
        seconds = []
        for few in ({Family(): grids[Family()]}, grids):
            start = time.perf_counter()
            found = batch_statistics(logits, few)
            seconds.append(prepared + time.perf_counter() - start)
        own, table = seconds
        rows.append({"forward": steered.seconds, "own": own, "table": table, "tokens": int(found.gold.sum())})
    tokens = found.families[Family()].tokens
    assert tokens is not None
    return rows[1:], tokens


def of_estimates(tokens: GoldTokens) -> float:
    """Seconds of everything that follows the forwards, for TOKENS tokens: those of a batch, over and over."""
    many = tokens.select(torch.arange(TOKENS) % len(tokens))
    many.sequence = (torch.arange(TOKENS) // TOKENS_A_SEQUENCE).int()
    count = TOKENS // TOKENS_A_SEQUENCE
    mus = Family().coarse()
    best = torch.randn(count, 1, dtype=torch.float64) + 1  # a parabola for each sequence
    sums = torch.stack([(mus - best).square() / 2, mus - best, torch.ones_like(mus - best)], 2)
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64).expand(count, 2)
    sizes = torch.full((count,), TOKENS_A_SEQUENCE)
    start = time.perf_counter()
    gold = TokenStatistics(many, NLLCurve(mus, sums, ends, sizes, sizes))
    Calibration.from_tokens(gold, estimator="exact", alpha=ALPHA, direction=KL)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"batches": 4, "batch-size": 8, "length": 64, "prompt": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    base, _ = load_model()
    model = get_peft_model(base, LoraConfig(r=8, target_modules=ATTENTION_PROJECTIONS, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    steered = Timed(steer(model.eval(), mu=0.0))
    rows, tokens = of_batches(steered, arguments)
    forward, own, table = (statistics.median(row[name] for row in rows) for name in ("forward", "own", "table"))
    estimates = of_estimates(tokens)
    forwards = forward * TOKENS / rows[0]["tokens"]
    report = {
        "model": BUNDLED_NAME,
        "dtype": str(next(base.parameters()).dtype),
        "device": str(steered.device),
        "threads": torch.get_num_threads(),
        "vocabulary": steered.steered.config.vocab_size,
        "tokens_a_batch": rows[0]["tokens"],
        "kept_a_token": tokens.num_kept.double().mean().item(),
        "forward_ms_a_token": 1e3 * forward / rows[0]["tokens"],
        "steering_ms_a_token": 1e3 * own / rows[0]["tokens"],
        "steering_share_of_forwards": own / forward,
        "table_ms_a_token": 1e3 * table / rows[0]["tokens"],
        "table_share_of_forwards": table / forward,
        "estimates_seconds_50000_tokens": estimates,
        "estimates_share_of_forwards": estimates / forwards,
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")


if __name__ == "__main__":
    main()
