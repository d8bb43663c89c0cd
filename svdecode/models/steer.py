"""`steer`: a model that decodes from the steered distribution, and is in every other way what it was made of."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from peft import PeftModel
from transformers import GenerationMixin, PreTrainedModel

from svdecode.common.versions import warn_untested
from svdecode.constants import Direction
from svdecode.models.adapters import adapter_fingerprint, check_adapter, is_prompt_learning, pretrained_of
from svdecode.models.few_rows_linear import use_few_rows
from svdecode.models.forward_inputs import CACHE, takes
from svdecode.models.image_inputs import PAIRED, pairs_images
from svdecode.models.lazy_cache import LazyCache
from svdecode.models.paired_layers import PairedLayers, wrapped_block
from svdecode.models.reach import counts_experts, frequencies_change, keeps_some_keys, keeps_state_in_modules
from svdecode.models.shared_weights import device_of, uncompiled
from svdecode.models.sides import sides_of
from svdecode.models.steered_class import steered_around
from svdecode.models.steered_model import SteeredModel
from svdecode.models.unchanged import Unchanged
from svdecode.models.virtual_tokens import VirtualTokens
from svdecode.ops.setting import Setting
from svdecode.strength.calibration import Calibration, saved_calibration

Other = PeftModel | PreTrainedModel | tuple[PeftModel, str]
Mode = Literal["auto", "paired", "lazy", "two_pass"]
MODES = get_args(Mode)


if TYPE_CHECKING:

    class SteeredPreTrainedModel(SteeredModel, PreTrainedModel, GenerationMixin):
        """What `steer` returns, for type checkers; the real class is made of the model's own (`steered_class`)."""


def steer(
    model: PeftModel | PreTrainedModel,
    *,
    pretrained: Other | tuple[Other, Other] | None = None,
    mu: float | Calibration | None = None,
    alpha: float | None = None,
    penalty: float | None = None,
    direction: Direction | None = None,
    mode: Mode = "auto",
) -> SteeredPreTrainedModel:
    """A model whose `generate()` decodes from the steered distribution, and whose `forward` returns its log-probs.

    The result is a transformers model of the same architecture over the same weights, in eval mode; `model` itself is left
    as it was: usable, unpatched, same `requires_grad`. Use one steered model from one thread at a time (a forward in the middle
    of another thread's raises RuntimeError); `steer` once more costs some kilobytes per layer.

    It follows what is written into the tensors that it shares, as training and peft's hotswap do. It follows no other change of
    `model` or `pretrained`, and its next forward raises RuntimeError: merging, disabling, another active adapter or scale,
    replaced modules or parameters, weights that were moved or converted. Undo it, or steer the model again.

    `steered.settings` holds mu, alpha, penalty and direction, and may be assigned.

    Args:
        model: a PeftModel, or any causal LM of transformers together with `pretrained`.
        pretrained: the other model, of the same tokenizer (padded vocabularies: see `vocabulary.py`). Left out, it is what
            lies under the adapter. `model` itself serves classifier-free guidance, with `pretrained_input_ids` (see
            `SteeredModel`). A pair (expert, anti_expert) makes the direction that of these two, applied to `model`: proxy
            tuning, DExperts. Each may be a PeftModel, also over one base, and that base itself;
            `(peft_model, "adapter name")` stands for one of its adapters.
        mu: steering strength, a number or a Calibration. None takes the calibration that was saved beside the adapter
            (`Calibration.save_pretrained` or `Calibration.from_pretrained` with its folder, earlier in this process).
            A calibration holds for the adapter, the alpha and the direction that it was made with.
        alpha: confidence threshold in [0, 1]. None follows the calibration; with a number as mu it is 0.1.
        penalty: lambda <= 0 for tokens outside the kept set. None follows the calibration, else it is -inf.
        direction: "kl" or "log_ratio". None follows the calibration, else it is "kl".
        mode: "paired" runs both models as one batch of doubled rows with one cache (every adapter, see
            `paired_layers.py`, and `pretrained=model`), "lazy" the pre-trained model only where more than one token is kept
            (penalty=-inf alone; see `lazy_cache.py`), "two_pass" two forwards with two caches (everything, also models on
            different devices). "auto" takes "paired" where it can, else "lazy", else "two_pass".

    Raises:
        ValueError: no adapter and no `pretrained`, an adapter whose pre-trained model cannot be recovered, different
            vocabularies, no strength, one calibrated for other settings, or a mode that the models do not allow.
    """
    warn_untested()
    if isinstance(model, SteeredModel):
        raise ValueError("model is steered already: assign to its settings, or steer the model that it was made of")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    model, pretrained = cast(Any, uncompiled(model)), cast(Any, uncompiled(pretrained))
    prompted = isinstance(model, PeftModel) and is_prompt_learning(model)
    sides = sides_of(model, pretrained)
    if pretrained is None or prompted:
        check_adapter(model)
    ft = sides[0].copy()
    others = [pretrained_of(ft)] if pretrained is None else [side.copy() for side in sides[1:]]
    others = [other.eval() for other in others]
    # Models that are made of one tree of weights, with or without the adapter, can share a forward.
    own = pretrained is None or pretrained is model
    settings = _settings(model, mu, alpha, penalty, direction)
    exact = _exact_mode(mode, ft, others, own, prompted, pretrained is model, settings.penalty)

    steered = steered_around(ft)
    steered.generation_config = copy.deepcopy(ft.generation_config)
    steered.settings = settings
    steered.mode, steered.row_steps, steered.skipped_row_steps = exact, 0, 0
    # Not submodules: parameters() and to() are those of the one model that the user sees.
    steered.__dict__["_others"] = others
    steered._same_layers = own
    steered._virtual_tokens = VirtualTokens(model) if prompted and isinstance(model, PeftModel) else None
    steered._paired_layers = PairedLayers(steered) if exact == "paired" and pretrained is None else None
    steered.__dict__["_unchanged"] = Unchanged(
        *(side.given for side in sides), used={name for side in sides for name in side.adapters or ()}
    )
    for tree in (steered, *steered._others):
        use_few_rows(tree)
    return steered.eval()


def _exact_mode(
    mode: str,
    ft: PreTrainedModel,
    others: list[PreTrainedModel],
    own: bool,
    prompted: bool,
    both_sides: bool,
    penalty: float,
) -> str:
    """`mode`, or for "auto" the fastest one that is exact here; ValueError where `mode` is not."""
    if not takes(ft, CACHE):
        raise ValueError(
            f"model is a {type(ft).__name__}, whose forward has no argument {CACHE}: it cannot be steered (Mamba models need "
            "transformers 5.24)"
        )
    if keeps_state_in_modules(ft):
        raise ValueError(
            f"model is a {type(ft).__name__}, which keeps a state outside its cache, where no beam or padding can follow it: "
            "steer the logits of whole forwards with svdecode.fused_steer"
        )
    if prompted and not keeps_some_keys(ft):
        raise ValueError(
            f"model is a {type(ft).__name__}, whose state does not tell virtual tokens from a prompt: train a LoRA instead"
        )
    unlike = own and _why_not_paired(ft, prompted)
    can_pair = own and not unlike
    if prompted and both_sides and (mode in ("lazy", "two_pass") or not can_pair):
        raise ValueError(f"mode={mode!r}: a prompt-learning adapter on both sides needs mode='paired'")
    if mode == "paired" and not can_pair:
        raise ValueError(f"mode='paired' needs {unlike or 'an adapter, and no pretrained='}: use mode='two_pass'")
    if mode == "paired" or (mode == "auto" and can_pair):
        return "paired"
    why = None
    if penalty != -math.inf:
        why = f"penalty=-inf, got {penalty}: with a finite one the pre-trained model changes every step"
    elif any(device_of(other) != device_of(ft) for other in others):
        devices = ", ".join(str(device_of(other)) for other in others)
        why = f"all models on one device, got {device_of(ft)} and {devices}: use mode='two_pass'"
    elif any(LazyCache.why_not(other) for other in others):
        why = next(LazyCache.why_not(other) for other in others)
    if mode == "lazy" and why:
        raise ValueError(f"mode='lazy' needs {why}")
    return "two_pass" if why or mode == "two_pass" else "lazy"


def _why_not_paired(model: PreTrainedModel, prompted: bool) -> str | None:
    """What a model lacks for one forward of both models' rows; None if nothing."""
    if _has_experts(model):
        return "a model without experts, which are given single tokens out of their rows"
    if not pairs_images(model):
        return f"a model without a tower for images, or one of {', '.join(PAIRED)}"
    if block := wrapped_block(model):
        return f"an adapter that saves no module with a cache ({block} has one)"
    if prompted and frequencies_change(model):
        return "rotary frequencies that do not depend on the length, which virtual tokens add to on one side"
    return None


def _has_experts(model: PreTrainedModel) -> bool:
    """Whether the model routes single tokens, out of their rows, to experts."""
    return counts_experts(model.config) or any(path.endswith(".experts") for path, _ in model.named_modules())


def _settings(
    model: object, mu: float | Calibration | None, alpha: float | None, penalty: float | None, direction: str | None
) -> Setting:
    """The calibration's, or the arguments with the paper's defaults; checked."""
    given = {"alpha": alpha, "penalty": penalty, "direction": direction}
    given = {name: value for name, value in given.items() if value is not None}
    if mu is not None and not isinstance(mu, Calibration):
        return Setting(mu, **given).check()
    Setting(0.0, **given).check()
    fingerprint = adapter_fingerprint(model)
    calibration = saved_calibration(fingerprint) if mu is None else mu
    return calibration.setting_for(fingerprint, **given).check()
