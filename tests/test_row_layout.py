"""Where rows begin: `RowLayout` and the formula of `row_start`, against the memory itself."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("triton")
from svdecode.kernels.row_layout import RowLayout, on_device_of

MEMORY = torch.arange(4096)
VOCABULARY = 4
TENSORS = {
    "contiguous": MEMORY[:96].view(2, 3, 4, VOCABULARY),
    "one row": MEMORY[:VOCABULARY].view(1, 1, 1, VOCABULARY),
    "no leading dimension": MEMORY[:VOCABULARY],
    "a slice of positions": MEMORY[:160].view(2, 5, 4, VOCABULARY)[:, :3],
    "transposed": MEMORY[:96].view(4, 3, 2, VOCABULARY).transpose(0, 2),
    "expanded": MEMORY[:12].view(1, 3, 1, VOCABULARY).expand(2, 3, 4, VOCABULARY),
    "padded rows": MEMORY[:240].view(2, 3, 4, 10)[..., :VOCABULARY],
    "a strided last dimension": MEMORY[:192].view(2, 3, 4, 8)[..., ::2],
}


def starts(tensor: torch.Tensor, sizes: tuple, strides: tuple) -> list[int]:
    """Offsets of all rows by the formula of `row_start`."""
    rows = tensor.numel() // tensor.shape[-1]
    return [
        (row // (sizes[0] * sizes[1])) * strides[0]
        + (row // sizes[1] % sizes[0]) * strides[1]
        + (row % sizes[1]) * strides[2]
        for row in range(rows)
    ]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("other", TENSORS)
def test_rows_begin_where_the_memory_says(name, other):
    pair = [TENSORS[name], TENSORS[other]]
    if pair[0].shape != pair[1].shape:
        pytest.skip("tensors of one call have one shape")
    layout = RowLayout(*pair)
    sizes, *strides = layout.of(*reversed(layout.tensors))
    for given, tensor, its in zip(reversed(pair), reversed(layout.tensors), strides, strict=True):
        assert (len(sizes), len(its)) == (2, 3)
        first = tensor.storage_offset()
        rows = [tensor.as_strided((VOCABULARY,), (1,), first + start) for start in starts(tensor, sizes, its)]
        assert torch.equal(torch.stack(rows), given.reshape(-1, VOCABULARY))


@pytest.mark.parametrize("name", ["contiguous", "transposed"])
def test_a_tensor_may_be_asked_for_twice(name):
    layout = RowLayout(TENSORS[name])
    sizes, first, second = layout.of(*layout.tensors, *layout.tensors)
    assert first == second


def test_a_tensor_of_another_layout_is_not_found():
    layout = RowLayout(TENSORS["transposed"])
    with pytest.raises(KeyError):
        layout.of(TENSORS["contiguous"])


def test_nothing_to_enter_where_the_device_is_current(monkeypatch):
    class OnDevice:
        is_cuda, device = True, torch.device("cuda", 1)

        def get_device(self):
            return 1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert isinstance(on_device_of(OnDevice()), contextlib.nullcontext)
    assert isinstance(on_device_of(MEMORY), contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert on_device_of(OnDevice()).idx == 1
