"""The decoder that vLLM compiles, with T tokens in, 2T inside, and (T, 2H) out.

The doubling has to lie inside of what is compiled: vLLM picks compiled code and CUDA graphs by the number of tokens that it
passes, which stays T, and a graph's inputs stay vLLM's own buffers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.sequence import IntermediateTensors

from svdecode.serving.attention import PairedAttention
from svdecode.serving.names import PREFIX
from svdecode.serving.streams import STREAMS, as_pairs, as_rows, twice

_TOKENS = {"input_ids": -1, "positions": -1, "position_ids": -1, "inputs_embeds": -2}
"""The arguments of a decoder that have one entry per token, and along which dimension."""


def double_core(model: nn.Module) -> None:
    """Exchange the forward of a model's decoder in place.

    Raises:
        ValueError: no module that vLLM compiles holds the attention layers. Tensors that its forward takes and that are not
            known raise one too, in its first forward, before the engine has started.
    """
    core = _core_of(model)
    core.__class__ = _doubled(type(core))
    if not core.do_not_compile:  # what it has compiled is bound to the old forward
        TorchCompileWithNoGuardsWrapper.__init__(core, compile_prefix=core._compile_prefix, is_encoder=core._is_encoder)
    if hasattr(model, "make_empty_intermediate_tensors"):  # what a pipeline stage receives
        model.make_empty_intermediate_tensors = functools.partial(_empty, model.make_empty_intermediate_tensors)


def _core_of(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, TorchCompileWithNoGuardsWrapper) and any(
            isinstance(layer, PairedAttention) for layer in module.modules()
        ):
            return module
    raise ValueError(
        f"vLLM's {type(model).__name__} has no decoder that it compiles as a whole: steer this model in transformers "
        "(svdecode.steer)"
    )


def _empty(make: Callable[..., IntermediateTensors], batch_size: int, dtype: Any, device: Any) -> IntermediateTensors:
    return _each(as_pairs, make(STREAMS * batch_size, dtype, device))


def _each(function: Callable[[Tensor], Tensor], tensors: IntermediateTensors) -> IntermediateTensors:
    return IntermediateTensors({name: function(tensor) for name, tensor in tensors.tensors.items()})


def _run(forward: Callable[..., Any], core: nn.Module, inputs: dict[str, Any]) -> Any:
    """A decoder's own forward on twice the tokens."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if name not in _TOKENS:
                raise ValueError(
                    f"vLLM's {type(core).__name__} takes {name}, which may be one per token or not: steer this model in "
                    "transformers (svdecode.steer)"
                )
            inputs[name] = twice(value, _TOKENS[name])
        elif isinstance(value, IntermediateTensors):
            inputs[name] = _each(as_rows, value)
    output = forward(core, **inputs)
    if isinstance(output, Tensor):
        return as_pairs(output)
    if isinstance(output, IntermediateTensors):
        return _each(as_pairs, output)
    return (as_pairs(output[0]),)  # a decoder of transformers, with return_dict=False


@functools.cache
def _doubled(cls: type) -> type:
    """The class of a decoder with `_run` around its forward.

    The new forward is written out with the names of the old one's parameters: vLLM finds by them which dimensions change from
    batch to batch, and torch.compile binds the arguments by the function's code, for which `*args` with a `__signature__` is
    not enough.
    """
    parameters = list(inspect.signature(cls.forward).parameters.values())
    head, passed = [], []
    for parameter in parameters:
        name = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise ValueError(f"vLLM's {cls.__name__}.forward takes *{name}, which cannot be doubled")
        if parameter.kind is parameter.VAR_KEYWORD:
            head.append(f"**{name}")
            passed.append(f"**{name}")
        else:
            head.append(name if parameter.default is parameter.empty else f"{name}=None")
            passed += [] if name == "self" else [f"{name}={name}"]
    source = f"def forward({', '.join(head)}):\n    return run(original, self, dict({', '.join(passed)}))\n"
    space: dict[str, Any] = {"run": _run, "original": cls.forward}
    exec(source, space)
    forward = space["forward"]
    forward.__defaults__ = tuple(p.default for p in parameters if p.default is not p.empty) or None
    forward.__module__ = __name__
    return type(PREFIX + cls.__name__, (cls,), {"forward": forward, "__module__": __name__})
