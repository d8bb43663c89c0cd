"""Counted bytes against the minimum of the method's section 4, at V = 128,256, bfloat16 in and float32 out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import svdecode

if torch.cuda.is_available():
    pytest.skip("the counter sits in the interpreter", allow_module_level=True)
pytest.importorskip("triton")
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("bench", "docs")]
import traffic
import traffic_table

VOCABULARY = 128_256


@pytest.fixture(scope="module")
def measured():
    with svdecode.use_backend("triton"):
        return traffic.measure(VOCABULARY)


@pytest.fixture(scope="module")
def table(measured):
    return {(row["rows"], row["operator"]): row["ratio"] for row in measured}


def test_the_page_has_these_figures(measured):
    """docs/kernels.md is up to date: `python docs/traffic_table.py` writes it."""
    assert traffic_table.written(traffic_table.PAGE.read_text()) == traffic_table.table(measured)


def test_peaked_rows_are_read_once_and_written_once(table):
    for operator in (
        "fused_steer",
        "fused_steer, labels",
        "fused_steer, return_kl=False",
        "steering_vector, alpha=0.1",
    ):
        assert 1.0 <= table["peaked", operator] <= 1.05, operator


def test_scalars_read_both_inputs_once(table):
    for operator in (
        "optimal_strength",
        "steer_sample, greedy",
        "steer_sample, temperature 1",
        "steer_topk, 8 tokens",
        "steered_nll, 4 strengths",
    ):
        assert 1.0 <= table["peaked", operator] <= 1.055, operator


def test_a_finite_penalty_reads_one_input_again(table):
    assert table["peaked", "fused_steer, penalty=-1"] <= 1.32


def test_flat_rows(table):
    """Their output is written twice, since the first launch fills it, unless the penalty is finite."""
    filled = ("fused_steer", "fused_steer, return_kl=False")
    for (rows, operator), ratio in table.items():
        if rows == "flat" and "labels" not in operator:
            assert ratio <= (2.6 if operator in filled else 2.12), operator


def test_the_counter_counts():
    pre, ft = (torch.zeros(2, 5000) for _ in range(2))
    with traffic.counted() as found:
        traffic.svdecode.fused_steer(pre, ft, 0.5, backend="triton")
    assert found.stored >= 2 * 5000 * 4
    assert found.loaded >= 2 * 2 * 5000 * 4
