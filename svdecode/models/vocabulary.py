"""Models whose vocabularies have one beginning and different ends: padding to a multiple, or tokens that one of them added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def vocabulary_size(model: PreTrainedModel) -> int:
    """V of the model's logits."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def check_vocabularies(models: dict[str, PreTrainedModel]) -> None:
    """Models of different sizes must have tokenizers that agree on the common part.

    The tokenizers are those in the folders that the models were loaded from; nothing is downloaded.

    Args:
        models: by the name of the argument, the adapted one first.

    Raises:
        ValueError: naming the first token that is another one, or the model beside which there is no tokenizer.
    """
    first, *others = models
    for other in others:
        common = min(vocabulary_size(models[first]), vocabulary_size(models[other]))
        if vocabulary_size(models[first]) != vocabulary_size(models[other]):
            _compare(first, models[first], other, models[other], common)


def _compare(first: str, model: PreTrainedModel, second: str, other: PreTrainedModel, common: int) -> None:
    sizes = f"{first} and {second} have different vocabularies: {vocabulary_size(model)} and {vocabulary_size(other)} tokens"
    found = {first: _tokenizer(model), second: _tokenizer(other)}
    for name, tokenizer in found.items():
        if tokenizer is None:
            raise ValueError(
                f"{sizes}. They can be steered on the common part if their tokenizers agree there, but none lies beside "
                f"{name}: save it into the model's folder (tokenizer.save_pretrained), and load the model from there"
            )
    ours, theirs = (_common_tokens(tokenizer, common) for tokenizer in found.values())
    for token in range(common):
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"{sizes}, and these are not the same tokens: {token} is {ours.get(token)!r} in {first} and "
                f"{theirs.get(token)!r} in {second}. Take two models of one tokenizer"
            )


def _tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    if not model.name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def _common_tokens(tokenizer: Any, common: int) -> dict[int, str]:
    return {token: text for text, token in tokenizer.get_vocab().items() if token < common}


def check_tokens(ids: Tensor | None, model: PreTrainedModel, size: int) -> None:
    """ValueError for input_ids that a model of the smaller vocabulary does not have."""
    limit = vocabulary_size(model)
    if ids is None or limit >= size or not bool((ids >= limit).any()):
        return
    raise ValueError(
        f"input_ids has the token {int(ids.max())}, and the pre-trained model knows {limit:,} tokens: "
        "add the token to it (resize_token_embeddings), or leave it out of the text"
    )


def in_vocabulary_of(logits: Tensor, ft: Tensor) -> Tensor:
    """(..., V) the logits of another model in the vocabulary of the adapted one's.

    Tokens that only the other model has are cut off: the adapted model cannot choose them. Tokens that only the adapted
    model has get its own odds against the common ones, so that both models give them the same probability and steering
    says nothing of them. With C the common part, for v outside C:

        a_v = z_v + logsumexp(a_C) - logsumexp(z_C)

    Args:
        logits: (..., W) of the other model, a.
        ft: (..., V) of the adapted model, z, on the same device.
    """
    common, size = logits.shape[-1], ft.shape[-1]
    if common >= size:
        return logits[..., :size]
    shift = logits.float().logsumexp(-1, keepdim=True) - ft[..., :common].float().logsumexp(-1, keepdim=True)
    return torch.cat([logits, (ft[..., common:].float() + shift).to(logits.dtype)], -1)
