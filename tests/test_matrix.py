"""Types of models x adapters x modes x caches (`matrix.py`): each cell is right or refused, and refusals are documented.

`make test` runs the types of `PART` with their most usual adapter; `make test-matrix` runs everything.
"""

from __future__ import annotations

import os

import matrix
import pytest
from architectures import BUILT, causal_types

PART = ("llama", "gpt_neo", "lfm2", "falcon_mamba", "gpt_oss", "opt")
EVERYTHING = "SVDECODE_MATRIX" in os.environ
NAMES = sorted(BUILT & set(causal_types())) if EVERYTHING else PART


@pytest.mark.parametrize("adapter", matrix.ADAPTERS if EVERYTHING else ["LoRA"])
@pytest.mark.parametrize("name", NAMES)
def test_right_or_refused_and_listed(name, adapter):
    run, listed = matrix.listed()
    assert name in run or EVERYTHING
    for mode in matrix.MODES[adapter]:
        for way, outcome in matrix.cell(name, adapter, mode).items():
            assert not outcome.startswith("wrong"), (mode, way, outcome)
            expected = set() if outcome == "right" else {matrix.sentence_of(outcome)}
            assert name not in run or listed.get((name, adapter, mode, way), set()) == expected, (mode, way)
