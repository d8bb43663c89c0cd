"""Block sizes and warps of all kernels: one table, with its reasons.

A row is cut into splits of `TILES * TILE` tokens, one program each, and a split into tiles. The numbers depend on nothing but
V, so a row's sums are merged in the same order alone, in any batch, and in every run.

- TILE = 1024: the unit that is read again when it holds a kept token. Peaked rows keep a few tokens, so 8 KB of bf16 pairs
  each time; smaller tiles would cost more statistics (24 bytes per tile) than they save.
- TILES = 4: a program's 4096 tokens are 32 per thread at 4 warps, which 16-byte loads cover with 4 (bf16) or 8 (fp32)
  independent loads per input, enough in flight to hide memory latency, within 128 registers. V = 151,936 gives 38 programs
  per row, and 8 rows fill the 132 processors of an H100 more than twice.
- STRENGTHS = 4: `steered_nll` evaluates so many strengths on a tile that it holds in registers (32 values per thread).
- maxnreg = 168: three programs of 128 threads fit on a processor's 65,536 registers, 48 KB of loads in flight. Left to itself
  the assembler aims at more programs for the small kernels and spills a few bytes to get there.
- warps = 4: reductions stay within 128 threads; more programs per processor beat larger programs.
"""

from __future__ import annotations

TILE = 1024
TILES = 4
SPLIT = TILE * TILES
STRENGTHS = 4
COMPILED_BLOCKS = {"TILES": (TILES,), "TILE": (TILE,)}
COMPILED_ROW = {**COMPILED_BLOCKS, "SPLITS": (32,)}
"""Block sizes with which `bench/compile_report.py` compiles kernels; 32 splits are V = 128,256."""

LAUNCH = {"num_warps": 4, "maxnreg": 168}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: Triton's vectors have such lengths."""
    return 1 << max(n - 1, 0).bit_length()


def splits(vocabulary: int) -> int:
    """Programs per row, from V alone."""
    return -(-vocabulary // SPLIT)
