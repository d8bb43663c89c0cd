"""A row with few kept tokens, as nearly all rows of a language model are: one program of the second launch finishes it.

It reads logits_ft of up to two kept tiles, once, and finds the kept tokens among them: at most one in each slot of SLOT tokens,
or the row is left to the slow way. What follows is computed for slots, not for tokens: logits_pre is read only where a kept
token is, and the sums, the normaliser and what is written come from the same registers. The launches after it find FINISHED in
the row's record, and end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svdecode.kernels import settings
from svdecode.kernels.row_algebra import NEG_INF
from svdecode.kernels.row_layout import within

HELD_TILES, SLOT = (tl.constexpr(number) for number in (settings.HELD_TILES, settings.SLOT))
FINISHED = tl.constexpr(-1.0)
"""Where the record of a row has its number of kept tiles."""


@triton.jit
def ends_of(some, WIDTH: tl.constexpr):
    """(first, last, number) of some tiles of a row; first = WIDTH and last = -1 where there is none."""
    index = tl.arange(0, WIDTH)
    # Three reductions: a warp reduces integers in one instruction each, but a tuple of them in 15 shuffles.
    first, last = tl.min(tl.where(some, index, WIDTH), 0), tl.max(tl.where(some, index, -1), 0)
    return first, last, tl.sum(some.to(tl.int32), 0)


@triton.jit
def load_held(ft_row, first, last, vocabulary, ALIGN: tl.constexpr, TILE: tl.constexpr):
    """(token of each slot's beginning, z) of two tiles, of one where first == last; -inf where there is no token."""
    slot = tl.arange(0, HELD_TILES * TILE // SLOT)
    is_first = slot < TILE // SLOT
    tile = tl.where(is_first, first, last)
    start = tile * TILE + slot % (TILE // SLOT) * SLOT
    token = start[:, None] + tl.arange(0, SLOT)[None, :]
    inside = within(token, vocabulary, ALIGN) & (is_first | (tile > first))[:, None]
    return start, tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)


@triton.jit
def kept_of_slots(start, z, threshold):
    """(token, z, whether there is one, whether one is alone) of the kept token of each slot."""
    # One kept token gives SLOT to 2 * SLOT - 1, more of them more.
    code = tl.sum(tl.where(z >= threshold, SLOT + tl.arange(0, SLOT)[None, :], 0), 1)
    return start + code - SLOT, tl.max(z, 1), code > 0, tl.max(code, 0) < 2 * SLOT
