"""The class of a steered model: `SteeredModel` in front of the model's own class, with a forward of the same signature."""

from __future__ import annotations

import functools
import inspect

from transformers import PreTrainedModel

from svdecode.models.forward_inputs import OWN_ARGUMENTS, with_cache_name
from svdecode.models.steered_model import SteeredModel


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
        output["logits"] = self.steered_logprobs(pre, ft)
        if labels is not None:
            loss = self.loss_function(output.logits, labels, vocab_size=output.logits.shape[-1], **for_loss)
            output = type(output)(**{"loss": loss, **output})  # in front, where a tuple has it
        return output.to_tuple() if as_tuple else output

    forward.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return forward


@functools.cache
def steered_class(cls: type[PreTrainedModel]) -> type:
    """The class of the model's steered twin."""
    return type(f"Steered{cls.__name__}", (SteeredModel, cls), {"forward": _forward_of(cls), "__module__": __name__})
