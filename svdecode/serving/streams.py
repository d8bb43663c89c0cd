"""Two streams of tokens in one batch, interleaved: token 0 of the pre-trained model, token 0 of the adapted one, and so on.

So the hidden states of both streams, (2T, H), are (T, 2H) in the same memory: outside of the decoder, all counts are of T.
"""

from __future__ import annotations

from torch import Tensor, stack

STREAMS = 2
PRETRAINED, ADAPTED = range(STREAMS)


def twice(x: Tensor, dim: int) -> Tensor:
    """Each entry along `dim` two times in a row, in memory of its own.

    Not `expand().reshape()`: for a single token that is a view with stride 0, and vLLM's C++ rotary kernel reads positions as
    if they lay one after another.
    """
    dim = dim % x.dim()
    return stack((x, x), dim + 1).flatten(dim, dim + 1)


def as_rows(x: Tensor) -> Tensor:
    """(..., T, 2H) to (..., 2T, H)."""
    return x.reshape(*x.shape[:-2], STREAMS * x.shape[-2], x.shape[-1] // STREAMS)


def as_pairs(x: Tensor) -> Tensor:
    """(..., 2T, H) to (..., T, 2H)."""
    return x.reshape(*x.shape[:-2], x.shape[-2] // STREAMS, STREAMS * x.shape[-1])


def both(x: Tensor) -> Tensor:
    """(..., 2T, H) to (T, 2, H): `both(x)[:, ADAPTED]` are the adapted stream's rows."""
    return x.view(-1, STREAMS, x.shape[-1])
