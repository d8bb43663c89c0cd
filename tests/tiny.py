"""Tiny random language models with adapters whose weights are not zero, and a decoder that keeps no state."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import svdecode

VOCABULARY = 97
PAD, EOS = 0, 1


def tiny_llama(vocabulary: int = VOCABULARY, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=2,
        initializer_range=0.3,  # confident enough to keep few tokens, unsure enough to keep several
    )
    return LlamaForCausalLM(config).eval()


def randomise(model: torch.nn.Module, scale: float = 0.3) -> None:
    """Adapters start at zero; give every trainable tensor values."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=scale)


def tiny_lora(**options: object) -> PeftModel:
    base = tiny_llama()
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    model = get_peft_model(base, config)
    torch.manual_seed(3)
    randomise(model)
    return model.eval()


def left_padded(lengths: tuple[int, ...] = (9, 4, 6)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = PAD
        mask[row, : width - length] = 0
    return ids, mask


@torch.no_grad()
def two_model_logits(model: PeftModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of both models by two plain forwards of two separate models."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    ft = copy.deepcopy(model)(**inputs).logits
    separate = copy.deepcopy(model)
    with separate.disable_adapter():
        return separate(**inputs).logits, ft


def stateless(model: PeftModel, ids: Tensor, mask: Tensor, steps: int, choose) -> Tensor:
    """Decode by recomputing everything at each step; choose(pre, ft) picks the tokens."""
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(steps):
        pre, ft = two_model_logits(model, ids, mask)
        token = torch.where(ended, PAD, choose(pre[:, -1], ft[:, -1]))
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(token[:, None])], 1)
        ended = ended | (token == EOS)
        if ended.all():
            break
    return ids


def steered_logprobs(pre: Tensor, ft: Tensor, mu: float, **settings: object) -> Tensor:
    return svdecode.fused_steer(pre, ft, mu, **settings).logprobs
