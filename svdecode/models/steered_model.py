"""`SteeredModel`: what `steer` makes of a model's class. Two models' logits for each forward, in one of three ways.

Steering happens inside `forward`, before `generate()` sees any logits: beams, sampling, penalties, caches and assistants then
work on steered log-probs as they would on any model's logits. A logits processor with a second model inside cannot do
that: its cache is never reordered by beam search.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from svdecode.models.borrowed_weights import BorrowedWeights
from svdecode.models.forward_inputs import (
    CACHE,
    OWN_ARGUMENTS,
    combined,
    positions_of,
    rows_of,
    takes_positions,
    trim,
    with_cache_name,
    with_own_prompt,
)
from svdecode.models.image_inputs import ImageInputs, check_arguments, given_images, leave_out
from svdecode.models.lazy_cache import LazyCache
from svdecode.models.lazy_forward import catch_up, rows_needed
from svdecode.models.masks import floor_gap
from svdecode.models.paired_layers import PairedLayers
from svdecode.models.reach import needs_dynamic_cache
from svdecode.models.rows_of_both import offsets_of_both, rows_of_both
from svdecode.models.settings import Settings
from svdecode.models.shared_weights import device_of
from svdecode.models.steered_cache import SteeredCache, check_empty, companion_of, extend, length_of
from svdecode.models.unchanged import Unchanged
from svdecode.models.virtual_tokens import VirtualTokens
from svdecode.models.vocabulary import check_tokens, in_vocabulary_of
from svdecode.ops.fused_steer import fused_steer


class SteeredModel(ImageInputs, Settings, BorrowedWeights):
    """What `steer` adds to the class of a model.

    settings: mu, alpha, penalty and direction as one immutable `svdecode.Setting`; assigning another one changes the model, and
        so does assigning to `mu`, `alpha`, `penalty` or `direction`.
    mode: "paired" (one forward of doubled rows), "lazy" (the pre-trained model only where more than one token is kept; every
        step if `penalty` is made finite) or "two_pass" (two models, two caches). This one cannot be changed.
    row_steps, skipped_row_steps: in lazy mode, how many rows' steps there were and how many the pre-trained model sat out.

    `forward` and `generate` take two arguments beside the model's own, `pretrained_input_ids` and
    `pretrained_attention_mask`, (B, T) like the prompt: the prompt that the pre-trained model sees instead, left-padded to the
    same length. With one model on both sides that is classifier-free guidance.
    """

    mode: str
    row_steps: int
    skipped_row_steps: int
    _inner: PreTrainedModel  # the adapted model, over the same modules (`steered_around`)
    _others: list[PreTrainedModel]  # the pre-trained model; or an expert and an anti-expert
    _unchanged: Unchanged
    _same_layers: bool  # whether the others' caches have the layers of this model's
    _paired_layers: PairedLayers | None  # None where one model is on both sides
    _virtual_tokens: VirtualTokens | None
    _floor_gap: float | None = None  # while generate() has masks: see `floor_gap`

    def train(self, mode: bool = True) -> SteeredModel:
        """As of any module."""
        self._inner.training = mode
        return super().train(mode)

    def extra_repr(self) -> str:
        """The settings and the mode, in the model's repr."""
        return ", ".join(f"{name}={value!r}" for name, value in {**self.settings._asdict(), "mode": self.mode}.items())

    @property
    def skipped_share(self) -> float:
        """Share of the rows' steps, since `steer`, that needed no forward of the pre-trained model."""
        return self.skipped_row_steps / max(self.row_steps, 1)

    def pair_logits(self, **inputs: object) -> tuple[Tensor, Tensor, object]:
        """Logits (B, T, V) of the pre-trained and of the adapted model, and the adapted model's output."""
        return self._pair(inputs, lazily=False)

    def logits_to_steer(self, **inputs: object) -> tuple[Tensor, Tensor, object]:
        """As `pair_logits`, but in lazy mode a row whose kept sets have one token each has the adapted logits twice."""
        return self._pair(inputs, lazily=self.mode == "lazy" and self.settings.penalty == -math.inf)

    def steered_logprobs(self, pre: Tensor, ft: Tensor) -> Tensor:
        """(..., V) float32 log-probs of the steered distribution."""
        return fused_steer(pre, ft, self.settings.mu, **self.settings.keywords, return_kl=False).logprobs

    def generate(self, inputs: Tensor | None = None, *arguments: Any, **keywords: Any) -> Any:
        """The model's own `generate()`, from the steered distribution."""
        self._unchanged.check()
        keywords = with_cache_name(keywords)
        ids = inputs if inputs is not None else keywords.get("input_ids")
        if isinstance(ids, Tensor) and ids.shape[-1] == 0 and keywords.get("inputs_embeds") is None:
            raise ValueError(f"input_ids is an empty prompt: shape {tuple(ids.shape)}")
        own, cache = keywords.get("pretrained_input_ids"), keywords.get(CACHE)
        started = cache is not None and length_of(cache) > 0
        if own is not None and not started and (ids is None or own.shape != ids.shape):
            raise ValueError(
                "pretrained_input_ids must be left-padded to the shape of the prompt, "
                f"{None if ids is None else tuple(ids.shape)}, got {tuple(own.shape)}"
            )
        if keywords.get("assistant_model") is not None and given_images(keywords):
            raise ValueError("assistant_model= cannot see the images of a steered model: leave it out")
        pad = self.generation_config.pad_token_id
        if own is not None and keywords.get("pretrained_attention_mask") is None and pad is not None:
            keywords["pretrained_attention_mask"] = ((own != pad).cumsum(-1) > 0).long()
        before, self._floor_gap = self._floor_gap, None
        try:
            return super().generate(inputs, *arguments, **keywords)
        finally:
            self._floor_gap = before

    def _get_logits_processor(self, *arguments: Any, **keywords: Any) -> Any:
        """The processors of one `generate()`: from here on its forwards know whether tokens outside K need scores."""
        processors = super()._get_logits_processor(*arguments, **keywords)
        all_have_scores = self.settings.penalty > -math.inf or self.settings.alpha == 0
        self._floor_gap = None if all_have_scores else floor_gap(processors)
        return processors

    def _pair(self, inputs: dict[str, object], lazily: bool) -> tuple[Tensor, Tensor, object]:
        inputs = {**with_cache_name(inputs), "return_dict": True}
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep must be a number, got a tensor")
        own = {name: inputs.pop(name, None) for name in OWN_ARGUMENTS}
        length, own_prompt = rows_of(inputs).shape[1], own["pretrained_input_ids"] is not None
        if not torch.compiler.is_compiling():  # generate() has checked
            self._unchanged.check()
        check_arguments(inputs, self, self._others, own_prompt, self._virtual_tokens is not None)
        with self._only_here():
            cache = self._extended_cache(inputs, own_prompt)
            other = inputs
            if own_prompt:
                other = with_own_prompt(inputs, takes_positions(self), **own)
            if self.mode == "paired":
                pre, ft, output = self._one_doubled_forward(other, inputs, length)
            else:
                output = self._adapted_forward(inputs, length)
                ft = output.logits
                pre = self._lazily(other, ft, cache, lazily) if self.mode == "lazy" else self._second(other, ft, cache)
        if cache is None and output.get(CACHE) is not None:  # a prefix's, which nobody asked for
            output = type(output)(**{name: value for name, value in output.items() if name != CACHE})
        return pre, ft, output

    def _one_doubled_forward(self, pre: dict, ft: dict, length: int) -> tuple[Tensor, Tensor, object]:
        """Rows [pre-trained | adapted] in one forward."""
        batch = rows_of(ft).shape[0]
        # One model on both sides has virtual tokens on both.
        masked = 0 if self._paired_layers is None else batch
        with offsets_of_both(self, batch):
            output = self._forward(rows_of_both(pre, ft, batch), masked_rows=masked, pairs=batch)
        if output["logits"].dim() != 3 or output["logits"].shape[0] != 2 * batch:
            raise RuntimeError(f"{type(self).__name__} reshapes the rows of a batch: use mode='two_pass'")
        if isinstance(ft.get(CACHE), SteeredCache):
            ft[CACHE].batch = batch
        trim(output, batch, length)
        return output["logits"][:batch], output["logits"][batch:], output

    def _adapted_forward(self, inputs: dict, length: int) -> object:
        output = self._forward({**inputs}, masked_rows=0)
        trim(output, 0, length)
        return output

    def _forward(self, inputs: dict, masked_rows: int, pairs: int = 0) -> object:
        if self._virtual_tokens is not None:
            self._virtual_tokens.put_in_front(inputs, self, masked_rows, takes_positions(self))
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if pairs and self._paired_layers is not None:
            self._paired_layers.set_rows(pairs, rows_of(inputs).shape[1])
        cache = inputs.get(CACHE)
        with cache.inside_forward() if hasattr(cache, "inside_forward") else contextlib.nullcontext():
            return self._inner(**inputs)

    def _second(self, inputs: dict, ft: Tensor, cache: Cache | None) -> Tensor:
        """The other models' forwards, with caches of their own."""
        if not self._same_layers and inputs.get("input_ids") is None:
            raise ValueError("two models need input_ids: inputs_embeds are those of one")
        inputs = {**inputs, "output_hidden_states": False, "output_attentions": False}
        found = []
        for index, model in enumerate(self._others):
            moved = {name: v.to(device_of(model)) if isinstance(v, Tensor) else v for name, v in inputs.items()}
            moved[CACHE] = None if cache is None else cache.companions[index]
            leave_out(moved, model, index)
            if not takes_positions(model):
                moved.pop("position_ids", None)
            elif not takes_positions(self) and isinstance(moved.get("attention_mask"), Tensor):
                moved["position_ids"] = positions_of(moved["attention_mask"])[:, -moved["input_ids"].shape[1] :]
            check_tokens(moved.get("input_ids"), model, ft.shape[-1])
            found.append(in_vocabulary_of(model(**moved).logits[:, -ft.shape[1] :].to(ft.device), ft))
        return combined(ft, found)

    def _lazily(self, inputs: dict, ft: Tensor, cache: Cache | None, lazily: bool) -> Tensor:
        """The other models' logits for the rows with a kept set of more than one token; `ft` for the rest."""
        needed = rows_needed(inputs, ft, self.settings.alpha) if lazily else torch.ones(len(ft), dtype=torch.bool)
        if lazily:
            self.row_steps += len(needed)
            self.skipped_row_steps += int((~needed).sum())
        if cache is None:
            return self._second(inputs, ft, None) if needed.any() else ft
        found = catch_up(self._others, cache.companions, inputs, ft, needed, takes_positions(self))
        return combined(ft, found) if found else ft

    def _extended_cache(self, inputs: dict[str, object], own_prompt: bool) -> Cache | None:
        """The forward's cache, made to follow both models; None where none is wanted."""
        cache, wanted = inputs.get(CACHE), inputs.get("use_cache")
        text = self.config.get_text_config(decoder=True)
        if cache is None and (getattr(text, "use_cache", False) if wanted is None else wanted):
            cache = inputs[CACHE] = DynamicCache(config=text)
        return None if cache is None else self._extend(cache, own_prompt)

    def _extend(self, cache: Cache, own_prompt: bool) -> Cache:
        if hasattr(cache, "inside_forward") and cache.owner() is self:
            filled = length_of(cache) > 0
            if filled and cache.own_prompt and not own_prompt:
                raise ValueError("the cache began with pretrained_input_ids: pass them again")
            if filled or cache.own_prompt == own_prompt:
                return cache
        check_empty(cache)
        if cache.is_compileable and needs_dynamic_cache(self, self._virtual_tokens is not None):
            raise ValueError(
                f"{type(self).__name__} counts keys, of which a static cache has too many: take a dynamic one"
            )
        companions: list = []
        if self.mode == "lazy":
            companions = [LazyCache(model) for model in self._others]
        elif self.mode == "two_pass":
            companions = [companion_of(cache, model, self._same_layers) for model in self._others]
        count = 0 if self._virtual_tokens is None else self._virtual_tokens.count
        masks_differ = own_prompt or count > 0 or (len(companions) > 0 and not self._same_layers)
        return extend(
            cache,
            paired=self.mode == "paired",
            companions=companions,
            virtual_tokens=count,
            one_mask=not masks_differ and self.mode != "lazy",
            own_prompt=own_prompt,
            owner=weakref.ref(self),
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        extra = 0 if self._virtual_tokens is None else self._virtual_tokens.count
        rows = 2 * batch_size if self.mode == "paired" else batch_size
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, rows, max_cache_length + extra
        )
        cache = model_kwargs.get(CACHE)
        if isinstance(cache, Cache):
            # Beams may be reordered before the first forward has had a chance to extend the cache.
            self._extend(cache, model_kwargs.get("pretrained_input_ids") is not None)
        return result

    @contextlib.contextmanager
    def _only_here(self) -> Iterator[None]:
        """A forward sets up layers for its rows: two threads in one steered model would mix them up without a word."""
        me = threading.get_ident()
        if self.__dict__.setdefault("_runs_in", me) != me:
            raise RuntimeError(
                "this steered model is running in another thread: call svdecode.steer once for each thread"
            )
        try:
            yield
        finally:
            self.__dict__.pop("_runs_in", None)
