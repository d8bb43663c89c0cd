"""The models of one `steer`: the adapted one, and those that it is steered away from, each over weights of its own.

peft puts adapters into the model that it is given, so that several PeftModels, and the plain model under them, may be one
tree of modules. Named together they mean different models: each PeftModel its own active adapters, and the plain model none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from svdecode.models.adapters import (
    active_adapters,
    adapter_layers,
    causal_lm_of,
    check_adapter,
    is_prompt_learning,
    pretrained_of,
)
from svdecode.models.bindings import check_bindings
from svdecode.models.paired_layers import is_adapted
from svdecode.models.shared_weights import share_weights, uncompiled
from svdecode.models.steered_model import SteeredModel
from svdecode.models.vocabulary import check_vocabularies


@dataclass
class Side:
    """A model as it was given: a PeftModel, a model of transformers, or (PeftModel, name of an adapter)."""

    name: str
    given: PeftModel | PreTrainedModel
    adapters: list[str] | None
    """Which are active; none in a plain model; None: as the layers are set, in a tree that is only one side's."""

    @property
    def tree(self) -> PreTrainedModel:
        """The modules."""
        return causal_lm_of(self.given, self.name)

    def copy(self) -> PreTrainedModel:
        """The model over the same weights."""
        if self.adapters == []:
            return pretrained_of(self.tree)
        copied = cast(PreTrainedModel, share_weights(self.tree))
        for module in copied.modules() if self.adapters is not None else ():
            if is_adapted(module):
                module.__dict__.update(_active_adapter=list(self.adapters), _disable_adapters=False)
        return copied


def sides_of(model: object, pretrained: object) -> list[Side]:
    """The model first, then what was given as `pretrained`; ValueError where they are no different models."""
    given = {"model": model}
    if isinstance(pretrained, tuple | list) and not _is_named(pretrained):
        if len(pretrained) != 2:
            raise ValueError(
                f"pretrained must be a model or a pair (expert, anti_expert), got {len(pretrained)} models"
            )
        given |= {f"pretrained[{i}]": other for i, other in enumerate(pretrained)}
    elif pretrained is not None:
        given["pretrained"] = pretrained
    sides = [_side(name, value) for name, value in given.items()]
    for side in sides:
        check_bindings(side.tree, side.name)
    _tell_apart(sides, guided=pretrained is model)
    check_vocabularies({side.name: side.tree for side in sides})
    for side in sides[1:]:
        if side.given is not model and isinstance(side.given, PeftModel) and is_prompt_learning(side.given):
            raise ValueError("pretrained has virtual tokens (prompt learning), which only `model` may have")
    return sides


def _is_named(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], str)


def _side(name: str, value: object) -> Side:
    if not _is_named(value):
        value = uncompiled(value)
        if isinstance(causal_lm_of(value, name), SteeredModel):
            raise ValueError(f"{name} is steered already, or holds a steered model: give the model that it was made of")
        return Side(name, cast(PreTrainedModel, value), None)
    model, adapter = uncompiled(cast(tuple, value)[0]), cast(tuple, value)[1]
    if not isinstance(model, PeftModel) or adapter not in model.peft_config:
        known = ", ".join(model.peft_config) if isinstance(model, PeftModel) else "none: it is no PeftModel"
        raise ValueError(f"{name} names the adapter {adapter!r}, and the model's adapters are {known}")
    return Side(name, model, [adapter])


def _tell_apart(sides: list[Side], guided: bool) -> None:
    """Sides over one tree get their adapters; ValueError where there are not several, or where one cannot be left out."""
    if guided:  # one model on both sides, with two prompts
        return
    for side in sides:
        same = [other for other in sides if other.tree is side.tree]
        if len(same) == 1 and side.adapters is None:
            continue
        for other in same:
            if isinstance(other.given, PeftModel):
                check_adapter(other.given)
        if adapter_layers(side.tree):
            check_adapter(side.tree)
        if side.adapters is None:
            side.adapters = active_adapters(side.given) if isinstance(side.given, PeftModel) else []
    first, second = sides[-2:] if len(sides) > 1 else (sides[0], None)
    if second is None or first.tree is not second.tree:
        return
    if len(sides) == 2 and (second.adapters == [] or first.adapters == second.adapters):
        raise ValueError(
            "pretrained is the model under the adapter, into which peft has put the adapter: leave pretrained out"
        )
    if first.adapters == second.adapters:
        raise ValueError(
            f"{first.name} and {second.name} are one model with the adapter {', '.join(first.adapters or ['none'])}: give "
            "adapters different names when you load them (adapter_name=), or name one as (model, 'name')"
        )
