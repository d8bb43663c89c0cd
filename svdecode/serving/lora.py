"""LoRA on the adapted stream's rows of vLLM's linear layers.

The product is added behind the layer's quantization method, to any base that vLLM can quantise, and before the sum over
tensor-parallel ranks. The pre-trained stream's rows are not touched.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.nn import functional
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import from_layer
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import is_pp_missing_parameter

from svdecode.serving import saved_adapter
from svdecode.serving.names import PREFIX
from svdecode.serving.saved_adapter import OTHERWISE
from svdecode.serving.streams import ADAPTED, STREAMS, both

_A, _B = "svdecode_a", "svdecode_b"


def put_adapter(model: nn.Module, folder: Path, hf_config: Any) -> int:
    """Put the LoRA in a folder onto the linear layers of a vLLM model, or its weights onto those that have it.

    Names, scales, packed projections and the slices of tensor-parallel ranks are those of vLLM's own LoRA layers, which are
    made for one layer at a time and thrown away.

    Returns:
        The number of layers that have it on this rank.

    Raises:
        ValueError: the adapter names layers that this model has not, or that vLLM has no LoRA for, or lacks weights for layers
            that it names.
    """
    config = PeftConfig.from_pretrained(str(folder))
    helper = PEFTHelper.from_local_dir(str(folder), None)
    packed = getattr(model, "packed_modules_mapping", {})
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, LinearBase)}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    named = {name.split(".")[-3] for name in saved_adapter.weights(folder)}  # what is no layer here is found below
    known = {name.rpartition(".")[2] for name in linears}.union(named, *packed.values())
    loras = LoRAModel.from_local_checkpoint(
        str(folder),
        known,
        helper,
        device="cpu",
        weights_mapper=mapper and mapper.get_rename_mapper(),
    ).loras
    for weights in loras.values():
        weights.optimize()  # the scale goes into B
    left, missing, count = set(loras), [], 0
    for name, layer in linears.items():
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in packed.get(last, [last])]
        if name in loras:
            parts = [name]  # packed in the checkpoint too
        found = [loras.get(part) for part in parts]
        missing += [part for part in parts if part not in loras and check_target_module_exists(config, part)]
        if any(found):
            left -= set(parts)
            _attach(layer, *_factors(name, layer, parts, found, _config(helper, layer), hf_config))
            count += 1
    left = {name for name in left if not is_pp_missing_parameter(f"{name}.weight", model)}
    if left:
        raise ValueError(
            f"the adapter in {folder} works on {', '.join(sorted(left)[:3])} ({len(left)} in all), which are no linear layers "
            f"of vLLM's {type(model).__name__}; {OTHERWISE}"
        )
    if missing:
        raise ValueError(
            f"the adapter in {folder} does not fit the model: there is nothing for {missing[0]} ({len(missing)} modules are "
            "missing): use the model that it was trained on"
        )
    return count


def _config(helper: PEFTHelper, layer: LinearBase) -> LoRAConfig:
    rank = max([helper.r, *helper.rank_pattern.values()])
    sizes = [size for size in MaxLoRARanks.__args__ if size >= rank]
    if not sizes:
        raise ValueError(
            f"the adapter has rank {rank}, and vLLM's layers at most {MaxLoRARanks.__args__[-1]}; {OTHERWISE}"
        )
    return LoRAConfig(max_lora_rank=sizes[0], max_loras=1, lora_dtype=layer.params_dtype)


def _factors(
    name: str, layer: LinearBase, parts: list[str], found: list[Any], config: LoRAConfig, hf_config: Any
) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of this rank's slice: the parts of a packed layer one after another, B block-diagonal."""
    dtype = layer.params_dtype
    sliced: Any = from_layer(layer, 1, config, parts, hf_config)
    if sliced is layer:
        raise ValueError(f"vLLM has no LoRA for {name}, a {type(layer).__name__}; {OTHERWISE}")
    pairs = [None if weights is None else (weights.lora_a.to(dtype), weights.lora_b.to(dtype)) for weights in found]
    if len(pairs) == 1:
        sliced.set_lora(0, *pairs[0])
    else:
        sliced.set_lora(0, [pair and pair[0] for pair in pairs], [pair and pair[1] for pair in pairs])
    slices, width, row = (
        list(zip(sliced.lora_a_stacked, sliced.lora_b_stacked, strict=True)),
        sum(sliced.output_slices),
        0,
    )
    if len(found) != len(slices):  # one pair of factors for a layer of several slices
        found = found * len(slices)
    all_a, all_b = [], []
    for weights, (a, b), height in zip(found, slices, sliced.output_slices, strict=True):
        if weights is not None:
            block = b.new_zeros(width, weights.rank)
            block[row : row + height] = b[0, 0, :, : weights.rank]
            all_a.append(a[0, 0, : weights.rank])
            all_b.append(block)
        row += height
    return torch.cat(all_a), torch.cat(all_b, 1)


def _attach(layer: LinearBase, a: Tensor, b: Tensor) -> None:
    if hasattr(layer, _A):  # weights that are loaded once more
        getattr(layer, _A).copy_(a)
        getattr(layer, _B).copy_(b)
        return
    # Buffers and not parameters: vLLM wants every parameter from the checkpoint.
    layer.register_buffer(_A, a, persistent=False)
    layer.register_buffer(_B, b, persistent=False)
    layer.requires_unquantized_input = True  # as vLLM's own LoRA layers
    for name in list(vars(layer)):  # kernels of a router that pass the quantization method by
        if name.startswith("allow_") and name.endswith("_gemm"):
            setattr(layer, name, False)
    assert layer.quant_method is not None
    layer.quant_method = _with_lora(type(layer.quant_method))(layer.quant_method)


@functools.cache
def _with_lora(cls: type) -> Any:
    class WithLoRA(cls):
        def __init__(self, method: Any) -> None:  # its state is that of the method which it replaces
            self.__dict__.update(method.__dict__)

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """(..., 2T, I) to (..., 2T, O)."""
            y = super().apply(layer, x, bias)
            low = functional.linear(x.reshape(-1, STREAMS, x.shape[-1])[:, ADAPTED], getattr(layer, _A))
            both(y)[:, ADAPTED].addmm_(low, getattr(layer, _B).t())
            return y

    WithLoRA.__name__ = WithLoRA.__qualname__ = PREFIX + cls.__name__
    return WithLoRA
