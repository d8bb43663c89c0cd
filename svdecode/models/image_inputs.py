"""Images in front of two models: each one's own tower and projector see them.

One forward of doubled rows gets each image twice, [for the pre-trained rows | for the adapted rows], and adapters on the tower
or the projector compute one half each. generate() of transformers 5.24 encodes images before the first forward, with the
model that it was called on; `ImageInputs` encodes them for the other model too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdecode.models.forward_inputs import takes, text_positions
from svdecode.models.reach import keeps_some_keys
from svdecode.models.rows_of_both import FEATURES, STANDARD, is_of_images, of_both
from svdecode.models.shared_weights import device_of

PAIRED = ("gemma3", "idefics3", "llava", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm")
"""Types of models for which one forward may have each image twice: `tests/test_images.py` shows it for each. Others may tell
images apart by their number in the batch."""


class FeaturesOfBoth(dict):
    """The encoded images of a forward of doubled rows, or the adapted model's, with those of the `others`."""

    others: list[dict[str, Any]]


def has_images(model: PreTrainedModel) -> bool:
    """Whether a model has another part than its language model, such as a tower for images."""
    return model.config.get_text_config(decoder=True) is not model.config


def pairs_images(model: PreTrainedModel) -> bool:
    """Whether images of both models can share a forward; True for a model that takes none."""
    return not has_images(model) or model.config.model_type in PAIRED


def modules_for_images(model: PreTrainedModel) -> set[int]:
    """The ids of the modules outside the language model: of the tower and the projector, whose rows are images or patches."""
    if not has_images(model):
        return set()
    text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    of_text = {id(module) for part in text if isinstance(part, nn.Module) for module in part.modules()}
    return {id(module) for module in model.modules() if id(module) not in of_text}


def given_images(inputs: dict[str, object]) -> list[str]:
    """The names of the arguments of images that are given."""
    return [
        name
        for name, value in inputs.items()
        if is_of_images(name)
        and (isinstance(value, Tensor) or (isinstance(value, list) and value and isinstance(value[0], Tensor)))
    ]


def check_arguments(
    inputs: dict[str, Any],
    model: PreTrainedModel,
    others: list[PreTrainedModel],
    own_prompt: bool,
    virtual_tokens: bool,
) -> None:
    """ValueError for arguments of a forward that would reach one model alone, or reach both and mean something else there."""
    if inputs.get(FEATURES) is not None and not isinstance(inputs[FEATURES], FeaturesOfBoth) and inputs.pop(FEATURES):
        raise ValueError(f"{FEATURES} are of one model, or of one chunk of a prompt: pass pixel_values, in one chunk")
    if own_prompt and not keeps_some_keys(model):
        raise ValueError(
            "pretrained_input_ids need a model with keys and values: a state does not tell how long a prompt was"
        )
    images = [*given_images(inputs), *(name for name in (FEATURES,) if inputs.get(name))]
    if images and own_prompt:
        raise ValueError(
            f"pretrained_input_ids cannot have {images[0]}: steer with images on both sides, or without any"
        )
    if images and virtual_tokens:
        raise ValueError(
            f"a prompt-learning adapter cannot be steered with {images[0]}: train a LoRA, or give text alone"
        )
    for name, value in inputs.items():
        extra = (name not in STANDARD and isinstance(value, Tensor | list)) or name in images
        for other in others:
            if extra and takes(model, name) and not takes(other, name):
                raise ValueError(
                    f"pretrained is a {type(other).__name__}, which takes no {name}: leave it out, or pass one that takes it"
                )


def leave_out(inputs: dict[str, Any], model: PreTrainedModel, index: int) -> dict[str, Any]:
    """Fit the arguments of the adapted model's forward to the other model number `index`; `inputs`, changed in place."""
    if inputs.get(FEATURES):
        inputs[FEATURES] = inputs[FEATURES].others[index]
    if not takes(model, "logits_to_keep"):
        inputs.pop("logits_to_keep", None)
    if isinstance(inputs.get("position_ids"), Tensor) and not has_images(model):
        inputs["position_ids"] = text_positions(inputs["position_ids"])
    return inputs


class ImageInputs:
    """What `SteeredModel` adds to how generate() encodes images before the first forward."""

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        if model_kwargs.get(FEATURES):
            raise ValueError(f"{FEATURES} are of one model: pass the images themselves (pixel_values)")
        given = model_kwargs
        if self.mode == "paired":
            names = given_images(given)
            given = {**given, **{name: of_both(name, given[name], given[name], -1) for name in names}}
        result = super()._prepare_multimodal_encoder_kwargs_for_generation({**given})
        if not result.get(FEATURES):
            return model_kwargs
        features = FeaturesOfBoth(result[FEATURES])
        features.others = []
        if self.mode != "paired":
            features.others = [
                model._prepare_multimodal_encoder_kwargs_for_generation(_moved(model_kwargs, model))[FEATURES]
                for model in self._others
            ]
        return {**{name: model_kwargs[name] for name in model_kwargs if name in result}, FEATURES: features}

    def _expand_multimodal_outputs(
        self, input_ids: Tensor, mm_encoder_output: FeaturesOfBoth, expand_size: int = 1, inputs_embeds: Any = None
    ) -> FeaturesOfBoth:
        ids = torch.cat([input_ids, input_ids]) if self.mode == "paired" else input_ids
        super()._expand_multimodal_outputs(ids, mm_encoder_output, expand_size, inputs_embeds)
        for model, features in zip(self._others, mm_encoder_output.others, strict=False):
            model._expand_multimodal_outputs(input_ids, features, expand_size, inputs_embeds)
        return mm_encoder_output


def _moved(inputs: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    return {name: v.to(device_of(model)) if isinstance(v, Tensor) else v for name, v in inputs.items()}
