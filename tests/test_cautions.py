"""What a calibration or an evaluation cannot show is said, in words and for programs; models that know nothing are bounded."""

from __future__ import annotations

import json
import time

import pytest
import torch
from evaluation_kit import quiet, tiny_tokenizer
from test_bootstrap import statistics_of
from tiny import batches, tiny_lora

import svdecode
from svdecode.strength.family import MAX_STRENGTH
from svdecode.strength.token_statistics import TokenStatistics

ROWS = [{"prompt": f"what is w{i} ?", "completion": f" w{(7 * i) % 50} w{i}"} for i in range(30)]


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


def codes(found) -> list[str]:
    return [caution["code"] for caution in found.cautions]


def statistics(deltas: torch.Tensor, gold: torch.Tensor) -> TokenStatistics:
    """Tokens, each a sequence, with kept sets of one size and equal log-probs; deltas (N, K)."""
    return statistics_of(torch.zeros_like(deltas), deltas, gold, torch.arange(len(gold)))


def of_tokens(tokens: TokenStatistics) -> svdecode.Calibration:
    return svdecode.Calibration.from_tokens(tokens, estimator="exact", alpha=0.1, direction="kl")


def test_the_end_of_the_search_is_no_optimum():
    torch.manual_seed(0)
    deltas = torch.rand(30, 4)
    found = of_tokens(statistics(deltas, deltas.argmax(1)))
    assert found.mu == MAX_STRENGTH
    assert codes(found) == ["end_of_search"]
    assert "is the end of the search and no optimum" in found.cautions[0]["text"]
    inside = of_tokens(statistics(deltas, torch.arange(30) % 4))
    assert codes(inside) == []
    assert json.loads(json.dumps(found.to_dict()))["cautions"] == found.cautions


def test_a_low_coverage_and_few_sequences():
    torch.manual_seed(0)
    gold = torch.arange(30) % 4
    gold[:16] = -1
    found = of_tokens(statistics(torch.rand(30, 4), gold))
    assert codes(found) == ["low_coverage"]
    assert "only 47% of the gold tokens" in found.cautions[0]["text"]
    assert codes(of_tokens(statistics(torch.rand(8, 4), torch.arange(8) % 4))) == ["few"]


def test_data_that_chose_the_strength_and_judge_it(lora, tmp_path):
    tokenizer = tiny_tokenizer()
    settings = dict(tokenizer=tokenizer, progress=False, alpha=0.01)
    again = svdecode.calibrate(lora, ROWS, held_out=ROWS[10:], **settings)
    assert "calibration_data_judge" in codes(again)
    assert "20 of these 20 held-out sequences chose the strength" in again.cautions[-1]["text"]
    apart = svdecode.calibrate(lora, ROWS[:25], held_out=ROWS[25:], **settings)
    assert "calibration_data_judge" not in codes(apart)
    apart.save_pretrained(tmp_path)
    loaded = svdecode.Calibration.from_pretrained(tmp_path)
    assert loaded.cautions == apart.cautions
    judged = quiet("nll", ROWS, lora, tokenizer, mu=loaded, estimators=["exact"], ablations=False)
    assert "calibration_data_judge" in codes(judged)
    assert any("25 of these 30 questions chose the strength" in line for line in judged.sentences())
    assert judged.to_dict()["cautions"] == judged.cautions
    other = quiet("nll", ROWS[25:], lora, tokenizer, mu=loaded, estimators=["exact"], ablations=False)
    assert "calibration_data_judge" not in codes(other)


def test_one_question_gives_no_interval(lora, tmp_path):
    found = quiet("nll", ROWS[:1], lora, tiny_tokenizer(), mu=1.0, output=tmp_path)
    ours = found.comparisons["NLL"]["SVDecode (mu = 1)"]
    assert (ours["interval"], ours["verdict"]) == (None, "not known")
    assert found.results["NLL"]["warm start"]["interval"] is None
    assert not any("beyond noise" in line for line in found.sentences())
    assert any("not known: one question gives no interval" in line for line in found.sentences())
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_models_that_know_nothing_take_no_more_than_others(tmp_path):
    """Nearly the whole vocabulary is kept: the statistics, their file and the figure are as small as those of a sure model."""
    torch.manual_seed(0)
    sizes = []
    for size in (2, 300):
        found = of_tokens(statistics(1e-3 * torch.rand(60, size), torch.randint(size, (60,))))
        found.save_pretrained(tmp_path)
        sizes.append((tmp_path / "svdecode.safetensors").stat().st_size)
        start = time.process_time()
        found.plot(tmp_path / "flat.png")
        assert time.process_time() - start < 10
    assert sizes[0] == sizes[1]


def test_batches_are_known_again_by_their_ids(lora):
    found = svdecode.calibrate(lora, batches(), held_out=batches(), alpha=0.05, progress=False)
    assert "12 of these 12 held-out sequences" in found.cautions[-1]["text"]
