"""What a copy of a model cannot take along: methods on an instance that reach the original by themselves.

`base.forward = lambda *a, **k: old(*a, **k)` runs the original whatever the copy is. A method of the class, a bound method, a
partial of it, a hook of accelerate and anything compiled can be bound to the copy (`shared_weights.py`).
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator

from torch import nn

from svdecode.models.shared_weights import LEFT_BEHIND, compiled_from, hooks_of


def check_bindings(model: nn.Module, name: str = "model") -> None:
    """ValueError where a module of `model` carries something that would run the original in place of the copy."""
    tree = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        where = f"{name}.{path}" if path else name
        for attribute, value in vars(module).items():
            shadows = callable(getattr(type(module), attribute, None)) or attribute == "_old_forward"
            if shadows and attribute not in LEFT_BEHIND and _reaches(value, tree, bound=True, seen=set()):
                raise ValueError(
                    f"{where} has a {attribute!r} of its own that runs the original model, so that steering would not reach "
                    f"it: delete it from the instance, or bind it with types.MethodType and let it use its own self"
                )
        for hook in hooks_of(module):
            if getattr(hook, "offload", False) and getattr(hook, "place_submodules", False):
                raise ValueError(
                    f"{where} is offloaded as one block (preload_module_classes), and adapters change the names of what is "
                    "in it: offload the model without preload_module_classes"
                )


def _reaches(value: object, tree: set[int], bound: bool, seen: set[tuple[int, bool]]) -> bool:
    """Whether a call of `value` gets at a module of the tree; `bound`: otherwise than as what it is bound to."""
    if (id(value), bound) in seen or isinstance(value, type | types.ModuleType):
        return False
    seen.add((id(value), bound))
    if isinstance(value, nn.Module):
        return not (bound and id(value) in tree) and any(id(module) in tree for module in value.modules())
    if isinstance(value, types.FunctionType) and (original := compiled_from(value)) is not None:
        return _reaches(original, tree, bound, seen)
    if isinstance(value, types.MethodType):
        return any(_reaches(part, tree, bound, seen) for part in (value.__self__, value.__func__))
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        return any(_reaches(part, tree, bound, seen) for part in parts)
    if isinstance(value, types.FunctionType):
        return any(_reaches(part, tree, False, seen) for part in _held_by(value))
    if isinstance(value, list | tuple):
        return any(_reaches(part, tree, False, seen) for part in value)
    if isinstance(value, dict):
        return any(_reaches(part, tree, False, seen) for part in value.values())
    if callable(value) and hasattr(value, "__dict__"):
        return any(_reaches(part, tree, False, seen) for part in vars(value).values())
    return False


def _held_by(function: types.FunctionType) -> Iterator[object]:
    """What a function can reach beside its arguments: closure, defaults and the global names that it loads."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # empty so far
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_GLOBAL" and step.argval in function.__globals__:
                value = function.__globals__[step.argval]
                # Functions of a library are left alone: they do not hold models of a user.
                if not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__:
                    yield value
