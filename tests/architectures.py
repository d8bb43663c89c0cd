"""A tiny random model of nearly every type of causal language model in transformers.

`SMALL` has what most configurations call their sizes; a type takes those that its configuration has, and its own from `OWN`.
"""

from __future__ import annotations

import torch
from tiny import EOS, PAD, VOCABULARY
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 48, "n_inner": 48,
    "ffn_dim": 48, "num_hidden_layers": 4, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "n_positions": 128, "n_ctx": 128, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 6,
    "rope_theta": 10000.0, "word_embed_proj_dim": 32, "is_decoder": True,
}  # fmt: skip

_DECODER = {
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "is_encoder_decoder": False, "num_hidden_layers": None,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 4,
}  # fmt: skip
_GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4, "mamba_n_groups": 1,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_WINDOW = {"use_sliding_window": True, "max_window_layers": 1}
_CONV = {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3}

OWN: dict[str, dict] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bart": _DECODER,
    "bert": {"num_hidden_layers": 2},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {**_DECODER, "attention_type": "original_full"},
    "blenderbot": _DECODER,
    "blenderbot-small": _DECODER,
    "codegen": {"rotary_dim": 4},
    "cohere2": _SLIDING,
    "ctrl": {"dff": 48},
    "deepseek_v2": {**_LATENT, **_GROUPS},
    "deepseek_v3": {**_LATENT, **_GROUPS},
    "dots1": _GROUPS,
    "exaone4": {**_SLIDING, "sliding_window_pattern": 2},
    "falcon": {"alibi": False, "new_decoder_architecture": False, "multi_query": True, "head_dim": None},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "num_hidden_layers": 2},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4, "intermediate_size": 64, "num_hidden_layers": 2},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        **_SLIDING, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
        "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {**_SLIDING, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "glm4_moe_lite": {**_LATENT, "topk_group": 1, "n_group": 1, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 6},
    "gpt_oss": _SLIDING,
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 16},
    "jamba": {
        "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "lfm2": {**_CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_CONV, "num_dense_layers": 1},
    "llama4_text": {
        "attention_chunk_size": 6, "no_rope_layers": [1, 0, 1, 0], "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48,
        "moe_layers": [1, 3], "layer_types": ["chunked_attention", "full_attention"] * 2,
    },
    "longcat_flash": {
        **_LATENT, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 2,
    },
    "mamba": {"state_size": 4, "time_step_rank": 4, "intermediate_size": 64, "num_hidden_layers": 2},
    "mamba2": {
        "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "num_hidden_layers": 2, "chunk_size": 4, "expand": 2,
    },
    "marian": {**_DECODER, "decoder_start_token_id": 0},
    "mbart": _DECODER,
    "minicpm3": _LATENT,
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 4},
    "modernbert-decoder": {"global_attn_every_n_layers": 2, "local_attention": 6},
    "mpt": {"max_seq_len": 128, "expansion_ratio": 2},
    "mvp": _DECODER,
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 4,
        "layers_block_type": ["mamba", "attention"] * 2,
    },
    "olmo3": _SLIDING,
    "olmo_hybrid": _LINEAR,
    "pegasus": _DECODER,
    "plbart": _DECODER,
    "qwen2": _WINDOW,
    "qwen3": _WINDOW,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": {**_LINEAR, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {
        "lru_width": 32, "attention_window_size": 6, "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"], "num_key_value_heads": 1,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": {"type_vocab_size": 1, "num_hidden_layers": 2},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "num_hidden_layers": 2},
    "smollm3": {**_SLIDING, "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True},
    "trocr": _DECODER,
    "xglm": {"attention_heads": 4},
    "xlnet": {"d_inner": 48},
    "xlstm": {"num_heads": 2, "num_blocks": 2, "embedding_dim": 32},
    "youtu": _LATENT,
    "zamba": {
        "mamba_d_state": 4, "n_mamba_heads": 2, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "mamba_d_state": 4, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 4, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"] * 2, "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


BUILT = frozenset({
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "bamba", "bert", "bert-generation", "big_bird",
    "biogpt", "bitnet", "bloom", "camembert", "codegen", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm",
    "data2vec-text", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "electra", "ernie", "ernie4_5",
    "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "flint",
    "gemma", "gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "kolibri1",
    "laguna", "lara_mini", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4_text", "longcat_flash", "mamba", "mamba2",
    "megatron-bert", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "ministral", "ministral3",
    "mistral", "mixtral", "modernbert-decoder", "moshi", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2",
    "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen3",
    "qwen3_5_text", "qwen3_next", "recurrent_gemma", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
    "xglm", "youtu", "zamba2",
})  # fmt: skip
"""The types of which there is a tiny model."""


def tiny_causal(name: str, scale: float = 0.15) -> PreTrainedModel:
    """A tiny random model of a type; whatever its classes raise where `SMALL` and `OWN` are not enough."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    aliases = getattr(kind, "attribute_map", {})
    sizes = {key: value for key, value in SMALL.items() if hasattr(default, key) and key not in aliases}
    sizes |= {aliases[key]: value for key, value in SMALL.items() if key in aliases and aliases[key] not in sizes}
    sizes |= OWN.get(name, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{key: v for key, v in sizes.items() if v is not None})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=scale)
    return model


def causal_types() -> list[str]:
    """All types of causal language models in the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
