"""Two streams in one attention layer: twice the heads, not twice the tokens.

The rows of token t in both streams, 2 x (heads x d), are one row of 2 x heads heads. The first half of the heads belongs to the
pre-trained model. The ratio of query heads to key heads stays, so that each half only ever meets its own keys. There is one
layer name, one cache with twice the key heads and one attention call: block tables, slots, chunked prefill and prefix caching
are vLLM's, unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from svdecode.serving.names import PREFIX
from svdecode.serving.streams import STREAMS

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""Attention backends that count the heads of the layers; the others ask the model's configuration, which has half as many."""

_SINKS = "svdecode_sinks"


class PairedAttention:
    """Mixed into the class of a layer that was made with twice the heads."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """(2T, heads x d) in and out."""
        rows = query.shape[0]
        if output_shape is not None:
            output_shape = torch.Size((rows // STREAMS, STREAMS * output_shape[-1]))
        inputs = (None if x is None else x.reshape(rows // STREAMS, -1) for x in (query, key, value))
        out = super().forward(*inputs, output_shape, output_dtype)
        return out.view(rows, -1)


@functools.cache
def _paired(cls: type) -> type:
    return type(PREFIX + cls.__name__, (PairedAttention, cls), {"__module__": __name__})


@contextlib.contextmanager
def twice_the_heads() -> Iterator[None]:
    """Decoder attention that is built inside has twice the heads, and takes both streams."""
    original = Attention.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Attention, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if type(self) not in (Attention, ChunkedLocalAttention) or given["attn_type"] != AttentionType.DECODER:
            original(self, *args, **kwargs)  # `check_layers` finds it
            return
        given["num_kv_heads"] = STREAMS * (given["num_kv_heads"] or given["num_heads"])
        given["num_heads"] *= STREAMS
        if given["alibi_slopes"] is not None:
            given["alibi_slopes"] = list(given["alibi_slopes"]) * STREAMS
        extra = given["extra_impl_args"]
        sinks = extra.get("sinks")
        if sinks is not None:
            extra["sinks"] = sinks.detach().repeat(STREAMS)
        original(*bound.args, **bound.kwargs)
        self.__dict__[_SINKS] = sinks
        self.__class__ = _paired(type(self))

    Attention.__init__ = init
    try:
        yield
    finally:
        Attention.__init__ = original


def fill_sinks(model: nn.Module) -> None:
    """Copy the attention sinks that were loaded with the weights to both halves of the heads."""
    for layer in model.modules():
        if isinstance(layer, PairedAttention) and layer.__dict__[_SINKS] is not None:
            layer.impl.sinks.copy_(layer.__dict__[_SINKS].detach().repeat(STREAMS))


def check_layers(layers: dict[str, object]) -> None:
    """ValueError where a layer with a cache or a state does not keep two streams.

    Args:
        layers: by name, those of the model in vLLM's `static_forward_context`.
    """
    for name, layer in layers.items():
        if not isinstance(layer, AttentionLayerBase):
            continue
        if not isinstance(layer, PairedAttention):
            raise ValueError(
                f"{name} is a {type(layer).__name__}, which cannot keep two streams (only attention with a cache of keys and "
                "values can): steer this model in transformers (svdecode.steer)"
            )
        backend = layer.attn_backend.get_name()
        if backend not in BACKENDS:
            raise ValueError(
                f"the attention backend {backend} takes its number of heads from the model's configuration, which does not "
                f"count both streams: choose one of {', '.join(BACKENDS)} with --attention-backend"
            )
