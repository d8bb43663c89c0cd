"""How a row is cut into tiles, splits and groups, and how kernels are launched: one table, with its reasons.

A row is cut into tiles of TILE tokens. A program of a streaming launch takes a split of TILES tiles; a program of a small
launch takes a group of tiles, of which it reads only those that hold a kept token. Every sum is stored per tile and merged in
the order of the tiles. A tile's sums depend on nothing but V and the dtypes, so a row has the same results alone, in any batch
and in every run, whatever the groups are.

- TILE = 1024: the unit that is read again when it holds a kept token. Peaked rows keep a few tokens, so 4 KB of bf16 pairs
  each time; smaller tiles would cost more statistics (24 bytes per tile) than they save.
- TILES = 4: one warp for each tile. A warp sums its own tile without a barrier. A thread holds 32 tokens of each input, which
  are 4 (bf16) or 8 (fp32) independent loads of 16 bytes per input, enough in flight to hide memory latency.
- PROGRAMS = 1024: about so many programs for a small launch. They run at once on an H100 (132 processors with 8 programs
  each), so the launch takes the time of one program.
- GROUP = 16: no fewer tiles for each of them, since every program reads all maxima of its row.
- FEW_TILES = 4: so many tiles are left to the row's first program, which has merged the row: the others end at once.
- HELD_TILES = 2: so many kept tiles one program of a small launch holds in registers, which then finishes the row alone.
- SLOT = 8: of so many tokens, 16 bytes of bf16, at most one may be kept for that. A thread loads a slot at once.
- FEW_TOKENS = 32: of so many kept tokens in a tile only these are written, one by one.
- STRENGTHS = 4: `steered_nll` evaluates so many strengths on a tile that it holds in registers (32 values per thread).
- warps = 4: reductions stay within 128 threads; more programs per processor beat larger programs.
- maxnreg = 168: three programs of 128 threads fit on a processor's 65,536 registers, 48 KB of loads in flight. Left to itself
  the assembler aims at more programs for the small kernels and spills a few bytes to get there.
- MOST_REGISTERS = 255, for a streaming launch over float32 logits: a thread holds twice the bytes of its 32 tokens, so that two
  programs of a processor have 64 KB of loads in flight.
- enable_fp_fusion = False: a multiply and an add stay two roundings unless the code says `tl.fma`. The algebra of
  `kept_sums.py` needs it, and copies of one formula in several kernels then agree to the last bit.
"""

from __future__ import annotations

TILE = 1024
TILES = 4
SPLIT = TILE * TILES
PROGRAMS = 1024
GROUP = 16
FEW_TILES = 4
HELD_TILES = 2
SLOT = 8
FEW_TOKENS = 32
STRENGTHS = 4
WARPS = 4
WARP_THREADS = 32
LOAD_BYTES = 16

LAUNCH = {"num_warps": WARPS, "maxnreg": 168, "enable_fp_fusion": False}
MOST_REGISTERS = 255
UNSPECIALISED = ("vocabulary", "num_tiles", "group_size", "zero")
"""Integers whose value no kernel is compiled for: a row's layout would differ from that of the same row in another batch."""


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: Triton's vectors have such lengths."""
    return 1 << max(n - 1, 0).bit_length()


def splits(vocabulary: int) -> int:
    """Programs per row of a streaming launch."""
    return -(-vocabulary // SPLIT)


def stream_launch(lanes: int) -> dict[str, object]:
    """Options of a streaming launch; `lanes` tokens per load of a warp are 256 for logits of two bytes."""
    two_bytes = lanes * 2 == WARP_THREADS * LOAD_BYTES
    return LAUNCH if two_bytes else {**LAUNCH, "maxnreg": MOST_REGISTERS}


def groups(rows: int, num_tiles: int) -> tuple[int, int]:
    """(programs per row, tiles per program) of a small launch."""
    programs = min(-(-num_tiles // GROUP), max(1, PROGRAMS // rows))
    size = -(-num_tiles // programs)
    return -(-num_tiles // size), size
