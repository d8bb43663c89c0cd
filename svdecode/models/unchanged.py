"""What a steered model does not follow: changes of the model that it was made of, other than of the numbers in its tensors.

A steered model shares parameters. A training step, or peft's hotswap, writes into them and is followed. Which adapter is
active, its scale, whether it is merged, and which modules and parameters there are, must stay what it was when `steer` was
called. Each forward compares all that with what it was, as identities of objects and without a loop in Python.
"""

from __future__ import annotations

import operator

import torch
from peft import PeftModel
from torch import Tensor, nn

from svdecode.models.adapters import active_adapters
from svdecode.models.shared_weights import hooks_of

_OF_A_LAYER = ("_active_adapter", "_disable_adapters", "merged_adapters")
_OF_A_PEFT_MODEL = ("active_adapter", "_adapters_disabled")
_BY_IDENTITY = ("_modules", "_parameters")
_WHAT = {
    "_active_adapter": "another adapter was made active",
    "active_adapter": "another adapter was made active",
    "_disable_adapters": "the adapter was disabled or enabled",
    "_adapters_disabled": "the adapter was disabled or enabled",
    "merged_adapters": "the adapter was merged into the weights or unmerged",
    "scaling": "the adapter's scale was changed",
    "_modules": "a module was replaced or removed",
    "_parameters": "a parameter was replaced or removed",
}


class Unchanged:
    """The state of some models, to compare with what it is later."""

    def __init__(self, *models: nn.Module, used: set[str] = frozenset()) -> None:
        """Remember the state of all modules of these models; `used` are adapters that count although they are not active."""
        # Entry i: the dictionary holders[i] had values[i] under keys[i], which is part of where[i] and was equal to before[i].
        self._holders: list[dict] = []
        self._keys: list[str] = []
        self._values: list[object] = []
        self._where: list[tuple[str, nn.Module, str]] = []
        self._before: list[object] = []
        self._weights: list[tuple[Tensor, torch.dtype, torch.device]] = []
        seen: set[int] = set()
        for model in models:
            idle = _idle_adapters(model) - used
            weight = next(model.parameters())
            self._weights.append((weight, weight.dtype, weight.device))
            for path, module in model.named_modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    self._remember(path or type(module).__name__, module, idle)
        self._note_lists()

    def _remember(self, path: str, module: nn.Module, idle: set[str]) -> None:
        state = vars(module)
        layer = "_active_adapter" in state or hasattr(type(module), "_active_adapter")
        for name in _OF_A_PEFT_MODEL if isinstance(module, PeftModel) else _OF_A_LAYER if layer else ():
            value = getattr(module, name)
            self._add(path, module, name, state, name, list(value) if isinstance(value, list) else value)
        scaling = state.get("scaling")
        for name in scaling if layer and isinstance(scaling, dict) else ():
            if name not in idle:
                self._add(path, module, "scaling", scaling, name, scaling[name])
        # accelerate puts offloaded weights there for each forward.
        offloaded = any(getattr(hook, "offload", False) for hook in hooks_of(module))
        for table in ("_modules",) if offloaded else _BY_IDENTITY:
            for name, value in state[table].items():
                # Without parameters there is nothing to replace: dropout, activations, no bias.
                if name not in idle and (isinstance(value, Tensor) or _has_parameters(value)):
                    self._add(path, module, table, state[table], name, value)

    def _add(self, path: str, module: nn.Module, attribute: str, holder: dict, key: str, before: object) -> None:
        self._holders.append(holder)
        self._keys.append(key)
        self._values.append(holder.get(key))
        self._where.append((path, module, attribute))
        self._before.append(before)

    def _note_lists(self) -> None:
        """Lists may be written into: their contents are compared too."""
        lists = [
            (getattr(module, attribute), before)
            for (_, module, attribute), before in zip(self._where, self._before, strict=True)
            if isinstance(before, list)
        ]
        self._lists, self._contents = [now for now, _ in lists], [before for _, before in lists]

    def check(self) -> None:
        """RuntimeError where something has changed that is not followed."""
        same = all(map(operator.is_, map(dict.get, self._holders, self._keys), self._values))
        if not same or self._lists != self._contents:
            self._compare()
        for weight, dtype, device in self._weights:
            if weight.dtype != dtype or weight.device != device:
                raise RuntimeError(
                    f"the weights were {dtype} on {device} at svdecode.steer and are {weight.dtype} on {weight.device}: "
                    "steer the model again"
                )

    def _compare(self) -> None:
        """An equal value in the place of another is no change."""
        for i, (path, module, attribute) in enumerate(self._where):
            holder, key, before = self._holders[i], self._keys[i], self._before[i]
            now = getattr(module, attribute) if key == attribute else holder.get(key)
            if now is not before and (attribute in _BY_IDENTITY or isinstance(now, Tensor) or now != before):
                raise RuntimeError(
                    f"{path}: {_WHAT[attribute]} after svdecode.steer, which a steered model does not follow: undo it, or "
                    "steer the model again"
                )
            self._values[i] = holder.get(key)
        self._note_lists()


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def _idle_adapters(model: nn.Module) -> set[str]:
    """Names of adapters that are not active: nothing depends on them."""
    return set(getattr(model, "peft_config", None) or {}) - set(active_adapters(model))
