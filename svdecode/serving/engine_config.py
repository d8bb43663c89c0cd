"""An engine's configuration before its processes start: what a steered model cannot be combined with, and what it adds."""

from __future__ import annotations

import logging
from typing import Any

from svdecode.serving import saved_adapter
from svdecode.serving.names import KEY, MU, PROCESSOR, check_version
from svdecode.serving.settings import Served

DRAFTS = ("ngram", "ngram_gpu", "suffix", "draft_model")
"""Ways of speculation that do not read the hidden states, which are twice as wide."""

PAST_LOADING = ("dummy", "ipc_cache", "modelexpress", "runai_streamer_sharded", "sharded_state", "tensorizer")
"""Ways of loading that fill a model's parameters past `load_weights`, which reads the adapter."""

_LOGGER = logging.getLogger("vllm.svdecode")  # below vLLM's own, which has a handler
_IN_TRANSFORMERS = "steer this model in transformers (svdecode.steer)"
RECURRENT = f"recurrent layers, which keep one state and not two: {_IN_TRANSFORMERS}"
"""What is in the way of a model with such layers, and the way out."""


def prepare(vllm_config: Any) -> None:
    """Check, and add the request's own strength and the adapter's digest. Called again, it changes nothing.

    Raises:
        ValueError: a setting or an adapter that cannot be served; the sentence says what to do.
    """
    check_version()
    served = Served.of(vllm_config.model_config.hf_config)
    saved_adapter.check(served.adapter)
    saved_adapter.check_layers(served.adapter, vllm_config.model_config.hf_config)
    why = _why_not(vllm_config)
    if why is not None:
        raise ValueError(f"a steered model cannot be served with {why}")
    # It counts T tokens where a layer gives it 2T.
    vllm_config.compilation_config.pass_config.fuse_allreduce_rms = False
    # vLLM's compile cache knows a model by its configuration, and this is part of it.
    vllm_config.additional_config[KEY] = saved_adapter.digest(served.adapter)
    if vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner:
        # V1 takes no processor then, and vLLM has no other place where a request could be refused.
        _LOGGER.warning("svdecode: %s is not read beside speculation: all requests have the server's strength", MU)
    else:
        processors = list(vllm_config.model_config.logits_processors or [])
        if PROCESSOR not in processors:
            vllm_config.model_config.logits_processors = [*processors, PROCESSOR]


def _why_not(vllm_config: Any) -> str | None:
    """What is in the way, and the way out; None if nothing."""
    model, parallel, drafts = vllm_config.model_config, vllm_config.parallel_config, vllm_config.speculative_config
    if vllm_config.lora_config is not None:
        return "--enable-lora: it has its own adapter, and vLLM's would be put on the pre-trained model too"
    if drafts is not None and drafts.method not in DRAFTS:
        return (
            f"speculation by {drafts.method!r}, whose head reads the hidden states of one model: choose one of "
            f"{', '.join(DRAFTS)}"
        )
    if model.use_mla:
        return f"latent attention (MLA), whose one head cannot be split into two streams: {_IN_TRANSFORMERS}"
    if model.is_hybrid or model.is_attention_free or model.has_inner_state:
        return RECURRENT
    if model.is_encoder_decoder:
        return f"an encoder: {_IN_TRANSFORMERS}"
    if model.is_multimodal_model:
        return f"images or sound: {_IN_TRANSFORMERS}"
    if model.runner_type != "generate":
        return f"the runner {model.runner_type!r}: it generates"
    if vllm_config.aux_output_config.enable_return_routed_experts:
        return "--enable-return-routed-experts: it would give those of both models' tokens as one model's"
    if vllm_config.load_config.load_format in PAST_LOADING:
        return f"--load-format {vllm_config.load_config.load_format}, which loads no adapter: use safetensors"
    if vllm_config.kv_transfer_config is not None:
        return "a store of keys and values outside the engine, whose entries do not name the adapter"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        return "--kv-sharing-fast-prefill, which counts half the tokens"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism, which would mix the heads of both streams: use tensor parallelism"
    if model.is_moe and (parallel.data_parallel_size > 1 or parallel.enable_expert_parallel):
        return (
            "experts spread by data or expert parallelism, whose buffers hold half the tokens: use tensor parallelism"
        )
    return None
