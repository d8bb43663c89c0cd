"""Requests over HTTP that vLLM answers without passing their own strength on: refused, in the server's process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from svdecode.serving.names import MU


def refuse_lost_strengths() -> None:
    """Let a request with beams and a strength of its own be answered with status 400: vLLM's beams drop its arguments."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for kind in (ChatCompletionRequest, CompletionRequest):
        kind.to_beam_search_params = _without_strength(kind.to_beam_search_params)


def _without_strength(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(request: Any, *rest: Any, **options: Any) -> Any:
        if MU in (request.vllm_xargs or {}):
            raise ValueError(f"beams have the server's own strength: leave {MU} or use_beam_search out")
        return make(request, *rest, **options)

    return made
