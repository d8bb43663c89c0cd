"""The class of a steered model: `SteeredModel` in front of the model's own class, with a forward of the same signature."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from transformers import PreTrainedModel

from svdecode.models.forward_inputs import OWN_ARGUMENTS, with_cache_name
from svdecode.models.steered_model import SteeredModel
from svdecode.ops.floor import with_floor


def _forward_of(cls: type[PreTrainedModel]):
    """A forward with the signature of the model's own, which generate() inspects, and the two arguments of ours."""
    signature = inspect.signature(cls.forward)
    parameters = list(signature.parameters.values())
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_ARGUMENTS]
    at = len(parameters) - (rest is not None)
    signature = signature.replace(parameters=[*parameters[:at], *ours, *parameters[at:]])

    @functools.wraps(cls.forward)
    def forward(self, *arguments, **keywords):
        bound = signature.bind(self, *arguments, **with_cache_name(keywords)).arguments
        inputs = {name: value for name, value in bound.items() if name not in ("self", rest)}
        inputs |= bound.get(rest, {}) if rest is not None else {}
        labels = inputs.pop("labels", None)
        for_loss = {name: inputs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in inputs}
        as_tuple = inputs.get("return_dict") is False
        pre, ft, output = self.logits_to_steer(**inputs)
        logprobs = self.steered_logprobs(pre, ft)
        output["logits"] = logprobs if self._floor_gap is None else with_floor(logprobs, ft, self._floor_gap)
        if labels is not None:
            loss = self.loss_function(output.logits, labels, vocab_size=output.logits.shape[-1], **for_loss)
            output = type(output)(**{"loss": loss, **output})  # in front, where a tuple has it
        return output.to_tuple() if as_tuple else output

    forward.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return forward


@functools.cache
def steered_class(cls: type[PreTrainedModel]) -> type:
    """The class of the steered model that `steered_around` makes."""
    return type(f"Steered{cls.__name__}", (SteeredModel, cls), {"forward": _forward_of(cls), "__module__": __name__})


# What runs around the forward of a module, on the instance. The model inside has it.
_AROUND_FORWARD = ("forward", "_old_forward", "_hf_hook")
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def steered_around(inner: PreTrainedModel) -> Any:
    """A steered model whose `forward` is its own and calls `inner`, of which it has everything else.

    `inner` is a copy (`share_weights`). What its instance carries around its forward, such as hooks of torch or accelerate,
    stays there and so sees what it is for: the forward of a model, and not steered log-probs.
    """
    cls = steered_class(type(inner))
    steered = cls.__new__(cls)
    for name, value in inner.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is inner:
            value = types.MethodType(value.__func__, steered)
        if name not in _AROUND_FORWARD:
            steered.__dict__[name] = type(value)() if name in _HOOKS else value
    steered.__dict__["_inner"] = inner  # not a submodule
    return steered
