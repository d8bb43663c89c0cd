"""Which variants of the kernels `bench/compile_report.py` compiles: those at V = 128,256, listed beside each kernel."""

from __future__ import annotations

from typing import NamedTuple

from svdecode.kernels.settings import TILE, TILES

COMPILED_TILE = {"ALIGN": (16,), "TILE": (TILE,)}
COMPILED_ROW = {**COMPILED_TILE, "WIDTH": (128,)}
COMPILED_SPLIT = {**COMPILED_ROW, "TILES": (TILES,), "LANES": (None,)}
"""LANES follows from the dtypes (`row_layout.py`)."""


class Variant(NamedTuple):
    """A kernel with the values of its constexpr parameters that are compiled, in all combinations."""

    kernel: object
    constants: dict[str, tuple]
    tensors: int
    """How many tensors' strides its `layout` carries; 0 where it has none."""
