"""Tiny random language models with adapters whose weights are not zero, and a decoder that keeps no state."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

import svdecode

VOCABULARY = 97
PAD, EOS = 0, 1


ARCHITECTURES = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": (
        Gemma2Config,
        {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    ),  # every other layer sees 8 tokens
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "opt": (OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
}


def tiny_model(architecture: str) -> PreTrainedModel:
    """Two layers of random weights."""
    kind, options = ARCHITECTURES[architecture]
    if "n_embd" not in options:
        options = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 128, **options,
        }  # fmt: skip
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        kind(vocab_size=VOCABULARY, initializer_range=0.3, **special, **options)
    ).eval()


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


def tiny_lora(vocabulary: int = VOCABULARY, **options: object) -> PeftModel:
    base = tiny_llama(vocabulary)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    model = get_peft_model(base, config)
    torch.manual_seed(3)
    randomise(model)
    return model.eval()


PROMPTS = {
    "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix tuning with an encoder": lambda: PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
}


def tiny_prompt(kind: str, architecture: str = "llama") -> PeftModel:
    """A prompt-learning adapter."""
    model = get_peft_model(tiny_model(architecture), PROMPTS[kind]())
    torch.manual_seed(3)
    randomise(model, scale=1.0)
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


@functools.lru_cache(maxsize=8)
def separate(model: PeftModel) -> tuple[object, object, object]:
    """Copies of the pre-trained and of the adapted model that share nothing with `model`, which must not change any more."""
    try:
        pretrained = copy.deepcopy(model)
    except RuntimeError as error:  # trained tokens of peft 0.19 hold a tensor with a history
        pytest.skip(f"this adapter cannot be copied for the comparison: {error}")
    off = pretrained.disable_adapter()
    off.__enter__()  # for as long as it is held
    return pretrained, copy.deepcopy(model), off


@torch.no_grad()
def two_model_logits(model: PeftModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of both models by plain forwards of two separate models, each row alone and without padding (0 there)."""
    found = []
    for one in separate(model)[:2]:
        rows = []
        for row, used in zip(ids, mask.bool(), strict=True):
            logits = one(input_ids=row[used][None], use_cache=False).logits[0, -int(used.sum()) :]
            rows.append(logits.new_zeros(len(row), logits.shape[-1]).masked_scatter_(used[:, None], logits))
        found.append(torch.stack(rows))
    return found[0], found[1]


@torch.no_grad()
def two_model_forwards(model: PeftModel, **inputs: object) -> tuple[Tensor, Tensor]:
    """Logits of both models by plain forwards of two separate models, without a cache."""
    pretrained, adapted, _ = separate(model)
    return tuple(one(**inputs, use_cache=False).logits for one in (pretrained, adapted))


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


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Ready batches of four rows, the first four tokens of each unlabelled."""
    torch.manual_seed(2)
    out = []
    for _ in range(count):
        ids = torch.randint(3, 97, (4, 10))
        labels = ids.clone()
        labels[:, :4] = -100
        out.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return out
