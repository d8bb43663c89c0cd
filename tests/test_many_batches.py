"""The statistics of many batches: joined in their order, and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svdecode.calibration.many_batches import ManyBatches
from svdecode.calibration.statistics import BatchStatistics, Sums
from svdecode.constants import KL, LOG_RATIO
from svdecode.strength.family import TEMPERATURE, Family
from svdecode.strength.token_statistics import GoldTokens

FAMILIES = [Family(KL, 0.1, -1.0), Family(LOG_RATIO, 0.0, 0.0), Family(TEMPERATURE, 0.0, 0.0)]

PEAK = """
import sys
import torch
from peft import LoraConfig, get_peft_model
import svdecode
from tiny import randomise, tiny_llama

def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(3, 49_152, (8, 12), generator=generator)
        yield {"input_ids": ids, "labels": torch.where(torch.arange(12) < 2, -100, ids)}

def megabytes(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024

torch.set_num_threads(1)
model = get_peft_model(tiny_llama(49_152), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
randomise(model)
settings = {"alpha": 0.0, "direction": "log_ratio", "progress": False, "compare": False}
svdecode.calibrate(model, list(batches(2)), **settings)  # code that is loaded, workspaces
before = megabytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
found = svdecode.calibrate(model, list(batches(int(sys.argv[1]))), **settings)
print(found.num_tokens, round(megabytes("VmHWM") - before))
"""


def part(length: int, start: int) -> BatchStatistics:
    tokens = GoldTokens(
        torch.randn(2 * length, 3),
        torch.randn(2 * length),
        torch.rand(2 * length),
        torch.randint(9, (2 * length,), dtype=torch.int32),
        torch.rand(2 * length) < 0.5,
        torch.arange(start, start + length, dtype=torch.int32).repeat_interleave(2),
    )
    families = {
        family: Sums(
            torch.randn(length, 5, 3, dtype=torch.float64),
            torch.randn(length, 2, dtype=torch.float64),
            torch.randint(9, (length,)),
            None if family.direction == TEMPERATURE else tokens,
        )
        for family in FAMILIES
    }
    return BatchStatistics(torch.arange(start, start + length), torch.full((length,), 2), families)


def test_parts_are_joined_in_their_order():
    parts = [part(length, 1000 * i) for i, length in enumerate([3, 0, 300, 1, 700])]  # beyond the first room
    batches = ManyBatches()
    for one in parts:
        batches.add(one)
    joined = batches.joined()
    assert torch.equal(joined.sequence, torch.cat([one.sequence for one in parts]))
    assert torch.equal(joined.gold, torch.cat([one.gold for one in parts]))
    assert list(joined.families) == FAMILIES
    for family, sums in joined.families.items():
        theirs = [one.families[family] for one in parts]
        for name in ("curve", "ends", "scored"):
            assert torch.equal(getattr(sums, name), torch.cat([getattr(one, name) for one in theirs])), name
        if family.direction == TEMPERATURE:
            assert sums.tokens is None
        else:
            expected = GoldTokens.concatenate([one.tokens for one in theirs])
            for name in GoldTokens.__dataclass_fields__:
                assert torch.equal(getattr(sums.tokens, name), getattr(expected, name)), name


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which tells a process's peak")
def test_the_whole_vocabulary_takes_little_memory():
    """20,000 tokens take 235 MB; results that were kept where they were made took 692, and 367 of the 8,000 here."""
    here = str(Path(__file__).parent)
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, "100"],
        capture_output=True, text=True, check=True, cwd=here, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    tokens, megabytes = map(int, ran.stdout.split())
    assert tokens == 8000
    assert megabytes < 300
