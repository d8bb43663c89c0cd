"""The programs of a greedy row meet in one atomic: on the PTX, in several orders of the programs, and broken on purpose.

Part of `make test-ptx` and of its subset; skipped where Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import math
import os
import re

import pytest
import torch
from rows import model_rows

import svdecode
from ptx.dtypes import Fault
from ptx.machine import ORDERS
from svdecode.kernels import settings

pytest.importorskip("triton")
from ptx import triton_driver
from ptx.triton_driver import Launcher

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "0", reason="needs pytest -p ptx.plugin")

ATOMIC = "atom.global.gpu.acq_rel.add.u32"
BARRIER = re.compile(r"bar\.sync\s+0;")


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch):
    monkeypatch.setattr(settings, "GROUP", 4)
    with svdecode.use_backend("triton"):
        yield


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    """One program after the other in an order."""
    monkeypatch.setattr(Launcher, "order", request.param)
    monkeypatch.setattr(Launcher, "at_once", 1)
    return request.param


def many_tiles() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose tiles all hold a kept token; three programs share them."""
    return tuple(x.float() for x in model_rows(2, 9008, spread=0.3))


@pytest.mark.parametrize("penalty", [-math.inf, -1.0])
def test_the_last_program_picks_in_any_order(penalty, order):
    pre, ft = many_tiles()
    tokens, logprobs = svdecode.steer_sample(pre, ft, 0.8, temperature=0.0, penalty=penalty)
    expected = svdecode.fused_steer(pre.double(), ft.double(), 0.8, penalty=penalty).logprobs
    assert tokens.tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(logprobs.double(), expected.amax(-1), rtol=0, atol=1e-5)


def without_barrier_after(ptx: str) -> str:
    before, atomic, after = ptx.partition(ATOMIC)
    return before + atomic + BARRIER.sub("", after, count=1)


def without_barriers_before(ptx: str) -> str:
    """Without our own and the one with which Triton hands out the atomic's result; either alone would do here."""
    before, atomic, after = ptx.partition(ATOMIC)
    places = [found.span() for found in BARRIER.finditer(before)][-2:]
    for start, end in reversed(places):
        before = before[:start] + before[end:]
    return before + atomic + after


MEANINGS = {name: lambda ptx, name=name: ptx.replace("acq_rel", name) for name in ("relaxed", "acquire", "release")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[pytest.param(change, "no release and acquire", id=name) for name, change in MEANINGS.items()],
        pytest.param(without_barrier_after, "read with no barrier", id="no barrier after it"),
        pytest.param(without_barriers_before, "written with no barrier", id="no barriers before it"),
    ],
)
def test_what_the_last_program_needs(change, message, order, monkeypatch):
    prepared = triton_driver.prepared
    changed = []

    def broken(ptx: bytes | str, *rest: object):
        text = ptx if isinstance(ptx, str) else ptx.decode()
        if ATOMIC in text:
            changed.append(text != change(text))
            text = change(text)
        return prepared(text, *rest)

    monkeypatch.setattr(triton_driver, "prepared", broken)
    with pytest.raises(Fault, match=message):
        svdecode.steer_sample(*many_tiles(), 0.8, temperature=0.0)
    assert changed == [True]
