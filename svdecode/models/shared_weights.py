"""A second tree of modules over the same parameters.

Steering needs a model whose adapter layers behave differently. Changing the user's model for the length of a forward would
be felt by every other thread, and by the user when an exception strikes in between. A tree of shallow copies costs a few
kilobytes per layer, shares every tensor, and can be changed at will.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

from torch import nn


def share_weights(root: nn.Module, replace: Callable[[nn.Module], nn.Module] = lambda module: module) -> nn.Module:
    """Copy the module tree below `root`, sharing parameters and buffers.

    Args:
        root: the model; it is not changed.
        replace: maps each module to the one whose copy takes its place, such as an adapter layer to its base layer.
    """
    copies: dict[int, nn.Module] = {}  # a module that occurs twice in the tree occurs twice in the copy

    def copy_of(module: nn.Module) -> nn.Module:
        module = replace(module)
        if id(module) in copies:
            return copies[id(module)]
        copy = copies[id(module)] = type(module).__new__(type(module))
        # __dict__ is updated directly: nn.Module's __setattr__ would register, and needs what is not there yet.
        for name, value in module.__dict__.items():
            if name == "_modules":
                value = {key: None if child is None else copy_of(child) for key, child in value.items()}
            elif isinstance(value, dict):
                value = value.copy()
            else:
                value = _rebound(value, module, copy)
            copy.__dict__[name] = value
        return copy

    return copy_of(root)


def _rebound(value: object, old: nn.Module, new: nn.Module) -> object:
    """Bind to the copy what an instance attribute bound to the original: accelerate's hooks replace `forward` that way."""
    if isinstance(value, types.MethodType) and value.__self__ is old:
        return types.MethodType(value.__func__, new)
    if isinstance(value, functools.partial) and value.args and value.args[0] is old:
        rebound = functools.partial(value.func, new, *value.args[1:], **value.keywords)
        rebound.__dict__.update({key: _rebound(item, old, new) for key, item in value.__dict__.items()})
        return rebound
    return value
