"""A second tree of modules over the same parameters.

Steering needs a model whose adapter layers behave differently. Changing the user's model for the length of a forward would
be felt by every other thread, and by the user when an exception strikes in between. A tree of shallow copies costs a few
kilobytes per layer, shares every tensor, and can be changed at will.

What an instance carries beside its class must come along bound to the copy: accelerate's hooks replace `forward` that way.
What is compiled is bound to the original for good, so the copy takes what was compiled. `check_bindings` refuses the rest.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

LEFT_BEHIND = {"_compiled_call_impl", "_compiled_call", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa"}
"""Compiled calls of the original that torch and transformers keep, and methods that accelerate puts on an instance to warn."""

_TENSORS_AND_MODULES = {"_parameters", "_buffers", "_modules"}


def uncompiled(module: object) -> object:
    """What `torch.compile` has wrapped, or the object itself."""
    while "_orig_mod" in getattr(module, "_modules", {}):
        module = module._modules["_orig_mod"]  # pyright: ignore[reportAttributeAccessIssue]
    return module


def compiled_from(function: types.FunctionType) -> object | None:
    """The callable that `torch.compile` made a function of; None for any other function."""
    return getattr(function, "_torchdynamo_orig_callable", None)


def share_weights(root: nn.Module, replace: Callable[[nn.Module], nn.Module] = lambda module: module) -> nn.Module:
    """Copy the module tree below `root`, sharing parameters and buffers.

    Args:
        root: the model; it is not changed.
        replace: maps each module to the one whose copy takes its place, such as an adapter layer to its base layer.
    """
    return _Copying(replace).tree(root)


class _Copying:
    def __init__(self, replace: Callable[[nn.Module], nn.Module]) -> None:
        self._replace = replace
        self._copies: dict[int, nn.Module] = {}  # a module that occurs twice in the tree occurs twice in the copy
        self._hooks: dict[int, object] = {}

    def tree(self, root: nn.Module) -> nn.Module:
        copied = self._module(root)
        for module in list(self._copies.values()):
            for name, value in module.__dict__.items():
                if name == "_hf_hook":
                    module.__dict__[name] = self._hook(value)
                elif name not in _TENSORS_AND_MODULES:
                    module.__dict__[name] = self._rebound(value)
        return copied

    def _original(self, module: nn.Module) -> nn.Module:
        while (other := self._replace(uncompiled(module))) is not module:
            module = other
        return module

    def _module(self, module: nn.Module) -> nn.Module:
        module = self._original(module)
        if id(module) in self._copies:
            return self._copies[id(module)]
        copied = self._copies[id(module)] = type(module).__new__(type(module))
        # __dict__ is updated directly: nn.Module's __setattr__ would register, and needs what is not there yet.
        for name, value in module.__dict__.items():
            if name == "_modules":
                value = {key: None if child is None else self._module(child) for key, child in value.items()}
            elif isinstance(value, dict):
                value = value.copy()
            if name not in LEFT_BEHIND:
                copied.__dict__[name] = value
        return copied

    def _rebound(self, value: object) -> object:
        """The value with the copies in place of the original modules that it holds or is bound to."""
        if isinstance(value, nn.Module):
            return self._copies.get(id(self._original(value)), value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(self._rebound(value.__func__), self._rebound(value.__self__))
        if isinstance(value, types.FunctionType) and (original := compiled_from(value)) is not None:
            return self._rebound(original)
        if isinstance(value, functools.partial):
            keywords = {key: self._rebound(item) for key, item in value.keywords.items()}
            rebound = functools.partial(self._rebound(value.func), *map(self._rebound, value.args), **keywords)
            rebound.__dict__.update({key: self._rebound(item) for key, item in value.__dict__.items()})
            return rebound
        if type(value) in (list, tuple):
            found = type(value)(map(self._rebound, value))
            return found if any(new is not old for new, old in zip(found, value, strict=True)) else value
        if type(value) in (dict, OrderedDict):
            found = type(value)((key, self._rebound(item)) for key, item in value.items())
            return found if any(found[key] is not item for key, item in value.items()) else value
        return value

    def _hook(self, hook: object) -> object:
        """A hook of accelerate with its own state of the forward that it is in; maps that hooks share are shared again."""
        if id(hook) not in self._hooks:
            copied = self._hooks[id(hook)] = copy.copy(hook)
            for name, value in vars(copied).items():
                if name == "hooks":
                    copied.__dict__[name] = tuple(map(self._hook, value))
                elif name == "tied_params_map" and value is not None:
                    loaded = {pointer: dict(devices) for pointer, devices in value.items()}
                    copied.__dict__[name] = self._hooks.setdefault(id(value), loaded)
        return self._hooks[id(hook)]


def hooks_of(module: nn.Module) -> list[object]:
    """accelerate's hooks on a module, which move inputs or load weights that are kept elsewhere."""
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def device_of(model: nn.Module, weight: torch.Tensor | None = None) -> torch.device:
    """Where a model computes: the device of a weight (None: of the first), or where accelerate's hooks load it."""
    device = next(model.parameters()).device if weight is None else weight.device
    if device.type == "meta":
        hooks = (hook for module in model.modules() for hook in hooks_of(module))
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        device = next((torch.device(found) for found in devices if found is not None), device)
    return device
