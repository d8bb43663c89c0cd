"""First launch of every operator: the statistics of each tile of each row, reading both inputs once.

One program per split (`settings.py`). It loads 4096 tokens of each input before it waits for any, and each of its four warps
sums a tile of its own: a statistic is first reduced over a thread's tokens, then over the warp, with no barrier. Programs that
will write log-probs or delta of few tokens fill the whole output here, where the arithmetic hides under the writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdecode.kernels import settings
from svdecode.kernels.launch import launch
from svdecode.kernels.row_algebra import (
    INF,
    NEG_INF,
    difference_from_top,
    exponential,
    finite_or_zero,
)
from svdecode.kernels.row_layout import RowLayout, row_pointer, within
from svdecode.kernels.settings import LAUNCH, TILE, TILES, UNSPECIALISED, next_power_of_2, splits, stream_launch
from svdecode.kernels.variants import COMPILED_SPLIT, Variant

# The workspace of a row: RECORD numbers of the row (`merged_row.py`), then FIELDS vectors with a number for each tile. The
# first are the statistics, the others belong to the operator's second launch.
MAX, TOTAL, PRE_TOP, WEIGHTED, PRE_MAX, PRE_TOTAL = (tl.constexpr(i) for i in range(6))
OWN_FIELDS = 6
FIELDS = tl.constexpr(13)
RECORD = tl.constexpr(8)
ROW_ARRIVED = tl.constexpr(7)
"""Where the record of a row counts the programs of its second launch that have done their part; an integer."""
FEW_TILES, FEW_TOKENS = (tl.constexpr(few) for few in (settings.FEW_TILES, settings.FEW_TOKENS))


@triton.jit
def workspace_of(workspace_ptr, row, WIDTH: tl.constexpr):
    """(record, fields) of a row."""
    record = workspace_ptr + row.to(tl.int64) * (RECORD + FIELDS * WIDTH)
    return record, record + RECORD


@triton.jit
def max_of_tile(x):
    """Largest of each tile's tokens, of a block (a thread's loads, tiles, tokens of a load)."""
    return tl.max(tl.max(x, 0), 1)


@triton.jit
def sum_of_tile(x):
    """Sum over each tile's tokens."""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def tokens_of_split(split, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """The tokens of a split as a block (TILE / LANES * TILES, LANES): a row of it is a warp's load, of each tile in turn.

    In two dimensions all versions of Triton deal out the rows to the warps in turn, so that each warp gets one tile.
    """
    row = tl.arange(0, TILE // LANES * TILES)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    return (split * TILES + row % TILES) * TILE + row // TILES * LANES + lane


@triton.jit
def by_tile(x, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """A block of `tokens_of_split` as (a thread's loads, tiles, tokens of a load)."""
    return tl.reshape(x, [TILE // LANES, TILES, LANES])


@triton.jit(do_not_specialize=UNSPECIALISED)
def row_statistics_kernel(
    pre_ptr,
    ft_ptr,
    out_ptr,
    workspace_ptr,
    vocabulary,
    zero,
    layout,
    WITH_KL: tl.constexpr,
    FILL: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the statistics of the tiles of one split, and FILL, where it is a number, into all of the split's output."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    token = tokens_of_split(split, LANES, TILES, TILE)
    inside = within(token, vocabulary, ALIGN)
    sizes, pre_strides, ft_strides, out_strides = layout
    z = tl.load(row_pointer(ft_ptr, row, sizes, ft_strides, zero, ALIGN) + token, mask=inside, other=NEG_INF)
    a = tl.load(row_pointer(pre_ptr, row, sizes, pre_strides, zero, ALIGN) + token, mask=inside, other=NEG_INF)
    if FILL is not None:
        fill = tl.full([TILE // LANES * TILES, LANES], FILL, tl.float32)
        tl.store(row_pointer(out_ptr, row, sizes, out_strides, zero, ALIGN) + token, fill, mask=inside)
    z = by_tile(z, LANES, TILES, TILE).to(tl.float32)
    a = by_tile(a, LANES, TILES, TILE).to(tl.float32)

    maximum = max_of_tile(z)
    pre_max = max_of_tile(a)
    top = finite_or_zero(maximum)
    raw_pre_top = max_of_tile(tl.where(z == maximum[None, :, None], a, NEG_INF))
    pre_top = tl.where(raw_pre_top == NEG_INF, top, raw_pre_top)
    u = z - top[None, :, None]
    e = exponential(u)  # e^-inf = 0 outside the vocabulary
    total = sum_of_tile(e)
    weighted = sum_of_tile(e * (u - (a - pre_top[None, :, None])))
    pre_total = tl.zeros_like(total)
    if WITH_KL:
        pre_total = sum_of_tile(exponential(a - finite_or_zero(pre_max)[None, :, None]))
    # An excluded token, the end of the row, NaN and +inf make a sum not finite: only then it is taken again, with care.
    if tl.max(tl.where(tl.abs(weighted) < INF, 0, 1), 0) > 0:
        weighted = sum_of_tile(e * difference_from_top(z, a, top[None, :, None], pre_top[None, :, None]))
        if WITH_KL:
            lost = max_of_tile(((a == NEG_INF) & (z > NEG_INF)).to(tl.float32))
            pre_total = tl.where(lost > 0, INF, pre_total)

    record, fields = workspace_of(workspace_ptr, row, WIDTH)
    tl.store(record + ROW_ARRIVED, 0.0, mask=split == 0)  # the bits of the integer 0
    fields += split * TILES + tl.arange(0, TILES)
    tl.store(fields + MAX * WIDTH, maximum)
    tl.store(fields + TOTAL * WIDTH, total)
    tl.store(fields + PRE_TOP * WIDTH, raw_pre_top)
    tl.store(fields + WEIGHTED * WIDTH, weighted)
    tl.store(fields + PRE_MAX * WIDTH, pre_max)
    if WITH_KL:
        tl.store(fields + PRE_TOTAL * WIDTH, pre_total)


@triton.jit
def load_field(fields, FIELD: tl.constexpr, some, other, WIDTH: tl.constexpr):
    """One field of some tiles of a row as a vector of WIDTH."""
    return tl.load(fields + FIELD * WIDTH + tl.arange(0, WIDTH), mask=some, other=other)


@triton.jit
def open_row(fields, num_tiles, log_alpha, WIDTH: tl.constexpr):
    """(used, maxima, kept, threshold): the tiles in use, their maxima, those with a kept token, the threshold of K."""
    used = tl.arange(0, WIDTH) < num_tiles
    maxima = load_field(fields, MAX, used, NEG_INF, WIDTH)
    threshold = tl.max(maxima, 0) + log_alpha
    return used, maxima, used & (maxima >= threshold), threshold


@triton.jit
def of_group(some, group, group_size, WIDTH: tl.constexpr):
    """Those tiles that belong to a program of a small launch: few tiles all to the first, many in turn."""
    index = tl.arange(0, WIDTH)
    in_turn = (index >= group * group_size) & (index < (group + 1) * group_size)
    return some & tl.where(tl.sum(some.to(tl.int32), 0) <= FEW_TILES, group == 0, in_turn)


@triton.jit
def next_tile(wanted, start, WIDTH: tl.constexpr):
    """The first wanted tile from `start` on, WIDTH where there is none."""
    index = tl.arange(0, WIDTH)
    return tl.min(tl.where(wanted & (index >= start), index, WIDTH), 0)


@triton.jit
def load_tile(pre_row, ft_row, tile, vocabulary, ALIGN: tl.constexpr, TILE: tl.constexpr):
    """(token, inside, z, a) of a tile in float32; -inf outside the vocabulary."""
    token = tile * TILE + tl.arange(0, TILE)
    inside = within(token, vocabulary, ALIGN)
    z = tl.load(ft_row + token, mask=inside, other=NEG_INF).to(tl.float32)
    a = tl.load(pre_row + token, mask=inside, other=NEG_INF).to(tl.float32)
    return token, inside, z, a


@triton.jit
def store_kept(pointers, values, keep, inside):
    """Store a tile into filled memory: of few kept tokens only these, or a peaked row would be written twice."""
    if tl.sum(keep.to(tl.int32), 0) <= FEW_TOKENS:
        tl.store(pointers, values, mask=keep)
    else:
        tl.store(pointers, values, mask=inside)


@triton.jit
def load_label(pre_row, ft_row, label, vocabulary):
    """(in_range, z, a) of a label in float32; -inf, and no access, where it is outside the vocabulary."""
    in_range = (label >= 0) & (label < vocabulary)
    z = tl.load(ft_row + label, mask=in_range, other=NEG_INF).to(tl.float32)
    a = tl.load(pre_row + label, mask=in_range, other=NEG_INF).to(tl.float32)
    return in_range, z, a


class Workspace:
    """What the launches of one call share: R rows of RECORD + FIELDS * width float32, of whose width `num_tiles` are used."""

    def __init__(self, layout: RowLayout) -> None:
        """Allocate it for the rows of a layout, which has logits_pre and logits_ft first."""
        ft = layout.tensors[1]
        self.vocabulary = ft.shape[-1]
        self.rows = ft.numel() // self.vocabulary
        self.splits = splits(self.vocabulary)
        self.num_tiles = self.splits * TILES
        self.width = next_power_of_2(self.num_tiles)
        words = RECORD.value + FIELDS.value * self.width
        self.memory = torch.empty((self.rows, words), dtype=torch.float32, device=ft.device)
        shared = {"ALIGN": layout.align, "TILE": TILE, "WIDTH": self.width}
        self.constants = {**shared, **LAUNCH}
        self.stream_constants = {**shared, "LANES": layout.lanes, "TILES": TILES, **stream_launch(layout.lanes)}


def row_statistics(layout: RowLayout, with_kl: bool, out: Tensor | None = None, fill: float | None = None) -> Workspace:
    """Launch the first pass; `fill` is written into all of `out`, a tensor of the layout."""
    pre, ft = layout.tensors[:2]
    workspace = Workspace(layout)
    launch(
        row_statistics_kernel,
        (workspace.rows, workspace.splits, 1),
        (pre, ft, out, workspace.memory, workspace.vocabulary, 0, layout.of(pre, ft, ft if out is None else out)),
        {"WITH_KL": with_kl, "FILL": fill, **workspace.stream_constants},
    )
    return workspace


KERNEL_VARIANTS = [
    Variant(
        row_statistics_kernel,
        {"WITH_KL": (False, True), "FILL": (None, float("-inf"))} | COMPILED_SPLIT,
        tensors=3,
    )
]
