"""Tiny random models of many families with a LoRA each, what `svdecode.steer` makes of them, and engines around them."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams

import svdecode
from svdecode.serving import engine_args

VOCABULARY, NEW, MU = 512, 16, 0.7
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": False, **SPECIAL,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 32}
WINDOW = {"sliding_window": 24}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "mistral": {**WIDE, **WINDOW},
    "gemma2": {**WIDE, **WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "gemma3_text": {**WIDE, **WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "sliding_window_pattern": 2},
    "phi3": GROUPED,
    "granite": GROUPED,
    "glm4": WIDE,
    "cohere": {**GROUPED, "tie_word_embeddings": True},
    "opt": {
        "vocab_size": VOCABULARY, "hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 512, "word_embed_proj_dim": 128, **SPECIAL,
    },
    "olmo2": GROUPED,  # these three by vLLM's backend around transformers
    "gpt_neox": COMMON,
    "stablelm": GROUPED,
    "mixtral": {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt_oss": {**WIDE, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},  # with attention sinks
}  # fmt: skip
"""By the model_type of transformers."""
WITH_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")


def prompts(lengths: Sequence[int] = (3, 9, 17, 40, 70, 71)) -> list[list[int]]:
    """Token ids; the last prompt begins as the last but one, so that it meets its blocks in the prefix cache."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [*found, found[-2][:48] + found[1]]


def tiny(folder: Path, kind: str, **lora: Any) -> Path:
    """The folder of a model, with its adapter in `lora`; made where it is missing.

    Args:
        folder: where models lie.
        kind: a family.
        lora: what to change in the adapter's configuration; it also names the folder.
    """
    name = kind if not lora else f"{kind}-{zlib.crc32(json.dumps(lora, sort_keys=True).encode()):x}"
    path = folder / name
    if (path / "done").exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind]), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
        elif "sinks" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    targets = ATTENTION if kind in WITH_EXPERTS else "all-linear"
    adapter(model, path / "lora", **{"target_modules": targets, **lora})
    (path / "done").touch()
    return path


def word(token: int) -> str:
    """Special tokens are no part of another word."""
    return f"<{token}>" if token <= 2 else f"w{token}"


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token, and a template for chats, which ends in token 4."""
    of_words = Tokenizer(WordLevel({word(token): token for token in range(VOCABULARY)}, unk_token=word(1)))
    of_words.pre_tokenizer = WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=of_words, unk_token=word(1), eos_token=word(2), pad_token=word(0))
    found.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w4"
    return found


def adapter(model: torch.nn.Module, folder: Path, scale: float = 0.1, **options: Any) -> None:
    """Save a random LoRA for a model; `options` are of peft's configuration, `scale` is the size of B."""
    config = LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    adapted.save_pretrained(folder)


def in_transformers(folder: Path, mu: float = MU, lora: str | Path = "lora", **options: Any) -> Any:
    """The same model and adapter, steered in transformers."""
    # Eager: transformers' sdpa leaves out the soft cap on Gemma 2's attention.
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return svdecode.steer(PeftModel.from_pretrained(base, folder / lora).eval(), mu=mu, **options)


@torch.no_grad()
def reference(steered: Any, prompt: list[int], new: int = NEW) -> tuple[list[int], list[dict[int, float]]]:
    """Greedy tokens, and for each of them the log-probs of the kept tokens."""
    ids = torch.tensor([prompt])
    out = steered.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    kept = [
        {int(token): float(row[token]) for token in (row > -torch.inf).nonzero()[:, 0]}
        for row in (logits[0] for logits in out.logits)
    ]
    return out.sequences[0, len(prompt) :].tolist(), kept


def engine(folder: Path, mu: float | None = MU, lora: str | Path = "lora", **options: Any) -> LLM:
    """A steered engine in this process, with chunks shorter than the longer prompts."""
    steering = {name: options.pop(name) for name in ("alpha", "penalty", "direction", "floor") if name in options}
    return LLM(**engine_args(folder, folder / lora, mu=mu, **steering, **{**small(), **options}))


def small() -> dict[str, Any]:
    """vLLM's arguments for a tiny model without a tokenizer."""
    return {
        "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8,
        "max_num_batched_tokens": 32, "block_size": 32, "enforce_eager": True, "disable_log_stats": True,
    }  # fmt: skip


def greedy(new: int = NEW, **options: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0, "max_tokens": new, "ignore_eos": True, "logprobs": 5, "detokenize": False, **options}
    )


def ask(llm: LLM, inputs: Sequence[list[int]], params: Any = None) -> list[Any]:
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in inputs], greedy() if params is None else params, use_tqdm=False
    )


def assert_equal(outputs: Sequence[Any], wanted: Sequence[tuple[list[int], list[dict[int, float]]]]) -> None:
    """The tokens, and the log-probs of the kept ones among those that vLLM gave, to 1e-4."""
    off = 0.0
    for output, (tokens, kept) in zip(outputs, wanted, strict=True):
        answer = output.outputs[0]
        assert list(answer.token_ids) == tokens
        for given, known in zip(answer.logprobs or [], kept, strict=False):
            for token, entry in given.items():
                if token in known:
                    off = max(off, abs(entry.logprob - known[token]))
                else:
                    assert entry.logprob < -900  # the floor
    assert off < 1e-4
