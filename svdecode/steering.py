"""`steer`: a model that decodes from the steered distribution, and is in every other way what it was made of.

Steering happens inside `forward`, before `generate()` sees any logits: beams, sampling, penalties, caches and assistants then
work on steered log-probs as they would on any model's logits. A logits processor with a second model inside cannot do
that: its cache is never reordered by beam search.
"""

from __future__ import annotations

import copy
import functools
import inspect

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from svdecode import validation
from svdecode.adapters import causal_lm_of, check_adapter, pretrained_of
from svdecode.caches import PairedRows, _check_empty, pair_rows, with_companion
from svdecode.calibration import Calibration, saved_calibration
from svdecode.constants import ALPHA, KL, PENALTY
from svdecode.ops import fused_steer
from svdecode.paired_layers import PairedLayers
from svdecode.shared_weights import share_weights

MODES = ("auto", "paired", "two_pass")
_ROW_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


class SteeredModel:
    """What `steer` adds to the class of a model. Attributes may be changed between calls.

    mu, alpha, penalty, direction: the settings of `svdecode.fused_steer`.
    mode: "paired" (one forward of doubled rows) or "two_pass" (two models, two caches).
    """

    mu: float
    alpha: float
    penalty: float
    direction: str
    mode: str

    def pair_logits(self, **inputs: object) -> tuple[Tensor, Tensor, object]:
        """Logits (B, T, V) of the pre-trained and of the adapted model, and the adapted model's output."""
        inputs["return_dict"] = True
        if self.mode == "paired":
            return self._one_doubled_forward(inputs)
        return self._two_forwards(inputs)

    def _one_doubled_forward(self, inputs: dict[str, object]) -> tuple[Tensor, Tensor, object]:
        rows = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        batch = rows.shape[0]
        for name in _ROW_ARGUMENTS:
            if isinstance(inputs.get(name), Tensor):
                inputs[name] = torch.cat([inputs[name], inputs[name]])
        cache = inputs.get("past_key_values")
        if cache is not None and not isinstance(cache, PairedRows):
            _check_empty(cache)
            pair_rows(cache)
        self._paired_layers.set_batch(batch)
        output = super().forward(**inputs)
        if isinstance(output.get("past_key_values"), Cache):
            pair_rows(output.past_key_values)
        for name in ("hidden_states", "attentions"):
            if output.get(name) is not None:
                output[name] = tuple(layer[batch:] for layer in output[name])
        return output.logits[:batch], output.logits[batch:], output

    def _two_forwards(self, inputs: dict[str, object]) -> tuple[Tensor, Tensor, object]:
        pretrained = self._pretrained
        cache = inputs.get("past_key_values")
        uses_cache = inputs.get("use_cache")
        if cache is None and (self.config.use_cache if uses_cache is None else uses_cache):
            cache = inputs["past_key_values"] = DynamicCache(config=self.config.get_text_config(decoder=True))
        if cache is not None:
            with_companion(cache, pretrained, self._same_layers)
        others = {
            name: value.to(pretrained.device) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        others["past_key_values"] = None if cache is None else cache.companion
        others["output_hidden_states"] = others["output_attentions"] = False
        pre = pretrained(**others).logits
        output = super().forward(**inputs)
        return pre.to(output.logits.device), output.logits, output

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *arguments, **keywords):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *arguments, **keywords)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache) and cache.get_seq_length() == 0:
            # Beams may be reordered before the first forward has had a chance to extend the cache.
            if self.mode == "paired":
                pair_rows(cache)
            else:
                with_companion(cache, self._pretrained, self._same_layers)
        return result


def _forward_of(cls: type[PreTrainedModel]):
    """A forward with the signature of the model's own, which generate() inspects."""
    signature = inspect.signature(cls.forward)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @functools.wraps(cls.forward)
    def forward(self, *arguments, **keywords):
        bound = signature.bind(self, *arguments, **keywords).arguments
        inputs = {name: value for name, value in bound.items() if name not in ("self", rest)}
        inputs |= bound.get(rest, {})
        labels = inputs.pop("labels", None)
        as_tuple = inputs.get("return_dict") is False
        pre, ft, output = self.pair_logits(**inputs)
        output["logits"] = fused_steer(
            pre,
            ft,
            self.mu,
            alpha=self.alpha,
            penalty=self.penalty,
            direction=self.direction,
            return_kl=False,
        ).logprobs
        if labels is not None:
            output["loss"] = self.loss_function(output.logits, labels, vocab_size=output.logits.shape[-1])
        return output.to_tuple() if as_tuple else output

    return forward


@functools.cache
def _steered_class(cls: type[PreTrainedModel]) -> type:
    return type(f"Steered{cls.__name__}", (SteeredModel, cls), {"forward": _forward_of(cls), "__module__": __name__})


def steer(
    model: object,
    *,
    pretrained: object | None = None,
    mu: float | Calibration | None = None,
    alpha: float = ALPHA,
    penalty: float = PENALTY,
    direction: str = KL,
    mode: str = "auto",
) -> SteeredModel:
    """A model whose `generate()` decodes from the steered distribution, and whose `forward` returns its log-probs.

    The result is a transformers model of the same architecture over the same weights, in eval mode; `model` itself is left
    as it was: usable, unpatched, same `requires_grad`. Use one steered model from one thread at a time.

    Args:
        model: a PeftModel, or any causal LM of transformers together with `pretrained`.
        pretrained: the pre-trained model with the same vocabulary; left out, it is what lies under the adapter.
        mu: steering strength, a number or a Calibration. None takes the calibration that was saved beside the adapter
            (`Calibration.save_pretrained` or `Calibration.from_pretrained` with its folder, earlier in this process).
            A calibration holds for the alpha and the direction that it was made with.
        alpha: confidence threshold in [0, 1].
        penalty: lambda <= 0 for tokens outside the kept set.
        direction: "kl" or "log_ratio".
        mode: "paired" runs both models as one batch of doubled rows with one cache (every adapter, see
            `paired_layers.py`), "two_pass" runs two forwards with two caches (everything), "auto" takes the first that is
            exact.

    Raises:
        ValueError: no adapter and no `pretrained`, an adapter whose pre-trained model cannot be recovered, different
            vocabularies, no strength, one calibrated for other settings, or a mode that the adapter does not allow.
    """
    validation.check_settings(alpha, direction, penalty)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    ft = causal_lm_of(model)
    pre = None if pretrained is None else causal_lm_of(pretrained, "pretrained")
    if pre is None:
        check_adapter(model)
    elif pre.config.get_text_config().vocab_size != ft.config.get_text_config().vocab_size:
        raise ValueError(
            "model and pretrained have different vocabularies: "
            f"{ft.config.get_text_config().vocab_size} and {pre.config.get_text_config().vocab_size}"
        )
    elif isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(f"{model.active_peft_config.peft_type.value} adapters are not supported yet")
    can_pair = pre is None and not _mixes_rows(ft)
    if mode == "paired" and not can_pair:
        raise ValueError(
            "mode='paired' needs an adapter, no pretrained=, and a model without experts: use mode='two_pass'"
        )
    strength = _strength(model, mu, alpha, direction)

    steered = share_weights(ft)
    steered.__class__ = _steered_class(type(ft))
    steered.generation_config = copy.deepcopy(ft.generation_config)
    steered.mu, steered.alpha, steered.penalty, steered.direction = strength, alpha, penalty, direction
    steered.mode = "paired" if can_pair and mode != "two_pass" else "two_pass"
    if steered.mode == "paired":
        steered._paired_layers = PairedLayers(steered)
    else:
        # Not a submodule: parameters() and to() are those of the one model that the user sees.
        other = pretrained_of(ft) if pre is None else share_weights(pre)
        steered.__dict__["_pretrained"] = other.eval()
        steered._same_layers = pre is None
    return steered.eval()


def _mixes_rows(model: PreTrainedModel) -> bool:
    """Whether the model routes single tokens, out of their rows, to experts."""
    config = model.config.get_text_config(decoder=True)
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _strength(model: object, mu: object, alpha: float, direction: str) -> float:
    if mu is not None and not isinstance(mu, Calibration):
        return validation.check_finite("mu", mu)
    calibration = saved_calibration(model) if mu is None else mu
    if (calibration.alpha, calibration.direction) != (alpha, direction):
        raise ValueError(
            f"mu was calibrated with alpha={calibration.alpha} and direction={calibration.direction!r}, "
            f"not with alpha={alpha} and direction={direction!r}: pass the same, or a number"
        )
    return calibration.mu
