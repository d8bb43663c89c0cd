"""The steered twin of a class of vLLM: `SteeredLlamaForCausalLM` and every other name of that form is made here, on first use.

T tokens -> [ decoder: 2T tokens, attention with twice the heads, LoRA on every second row ] -> (T, 2H)
compute_logits: (n, 2H) -> (2n, H) -> one product with the output head -> steered log-probs (n, V)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry

from svdecode.ops.floor import with_floor
from svdecode.ops.fused_steer import fused_steer
from svdecode.serving.attention import check_layers, fill_sinks, twice_the_heads
from svdecode.serving.doubled_core import double_core
from svdecode.serving.engine_config import prepare
from svdecode.serving.lora import put_adapter
from svdecode.serving.model_state import steered_state
from svdecode.serving.names import PREFIX, TRANSFORMERS_BACKEND
from svdecode.serving.settings import Served
from svdecode.serving.streams import ADAPTED, PRETRAINED, as_rows, both
from svdecode.serving.strength import Strengths

logger = init_logger(__name__)


def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return steered_class(ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls())


def steered_scores(pre: Tensor, ft: Tensor, mu: float | Tensor, uncut: bool, served: Served) -> Tensor:
    """(n, V) float32 steered log-probs, with the floor below them, from (n, V) logits of both models.

    Args:
        pre: of the pre-trained model.
        ft: of the adapted model.
        mu: one strength, or (n,) of them.
        uncut: whether a strength may be 0. Such a row has the adapted model's log-probs, of all tokens.
        served: all other settings.
    """
    if uncut and not isinstance(mu, Tensor):
        return ft.float().log_softmax(-1)
    scores = fused_steer(pre, ft, mu, return_kl=False, **served.setting.keywords).logprobs
    if served.floor:
        scores = with_floor(scores, ft)
    return torch.where((mu == 0)[:, None], ft.float().log_softmax(-1), scores) if uncut else scores


@functools.cache
def steered_class(cls: Any) -> type[nn.Module]:
    """The twin of a class of vLLM."""

    class Steered(cls):
        supports_lora = False  # vLLM's own LoRA maps T tokens, of which there are 2T here

        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            prepare(vllm_config)
            if not supports_lora(cls):
                names = " or ".join(PREFIX + name for name in TRANSFORMERS_BACKEND)
                raise ValueError(f"vLLM's {cls.__name__} takes no LoRA: name the architecture {names}")
            config = vllm_config.model_config.hf_config
            # Classes look their own architecture up.
            config.architectures = [name.removeprefix(PREFIX) for name in config.architectures]
            layers = vllm_config.compilation_config.static_forward_context
            before = set(layers)
            with twice_the_heads():
                super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            check_layers({name: layer for name, layer in layers.items() if name not in before})
            double_core(self)
            self._served = Served.of(config)
            self._strengths = Strengths.of(vllm_config)
            self._has_adapter = False

        @property
        def compute_logits_local(self) -> None:
            """Not here: it would choose tokens past `compute_logits`. vLLM does without where a model has none."""
            raise AttributeError("compute_logits_local")

        get_top_tokens = compute_logits_local

        def load_weights(self, weights: Any) -> Any:
            loaded = super().load_weights(weights)
            count = put_adapter(self, self._served.adapter, self.config)
            fill_sinks(self)
            self._has_adapter = True
            logger.info("svdecode: LoRA on %d layers, %s", count, self._served.setting)
            return loaded

        def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            """(n, 2H) to (n, V) float32 log-probs; None on ranks that have no logits."""
            if not self._has_adapter:
                raise RuntimeError("the adapter was not loaded: vLLM has filled this model without its load_weights")
            logits = super().compute_logits(as_rows(hidden_states), *args, **kwargs)
            if logits is None:
                return None
            rows = both(logits)
            mu, uncut = self._strengths.take(len(rows), self._served.setting.mu, logits.device)
            return steered_scores(rows[:, PRETRAINED], rows[:, ADAPTED], mu, uncut, self._served)

        def get_model_state_cls(self) -> type:
            """Model runner V2."""
            if not hasattr(cls, "get_model_state_cls"):
                return steered_state()
            return steered_state(super().get_model_state_cls())

    Steered.__name__ = Steered.__qualname__ = PREFIX + cls.__name__
    return Steered
