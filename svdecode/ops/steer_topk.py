"""`steer_topk`: the best tokens of the steered distribution, for a beam search."""

from __future__ import annotations

import torch
from torch import Tensor

from svdecode.constants import ALPHA, KL, PENALTY, BackendName, Direction
from svdecode.ops import validation
from svdecode.ops.torch_library import PAIR, Operator, check_tensors, float_dtype, rows_like, runner


def steer_topk(
    logits_pre: Tensor,
    logits_ft: Tensor,
    mu: float | Tensor = 1.0,
    *,
    k: int,
    alpha: float = ALPHA,
    penalty: float = PENALTY,
    direction: Direction = KL,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of the steered distribution (Eq. 10 to 20), best first: what a beam search needs of a step.

    The kernels write nothing of size (..., V). They know the best token of each piece of a row from its statistics.
    k times they take the best of these tokens, and the next one of its piece takes its place.

    Args:
        logits_pre: (..., V) logits of the pre-trained model.
        logits_ft: (..., V) logits of the warm-started model.
        mu: steering strength, a number or a tensor that broadcasts to (...).
        k: how many tokens, 1 to V.
        alpha: confidence threshold in [0, 1].
        penalty: lambda <= 0 for tokens outside K.
        direction: "kl" or "log_ratio".
        backend: "reference", "cpu", "triton", "cuda", or None to pick by device (see `svdecode.backends`).

    Returns:
        tokens (..., k) int64 and logprobs (..., k) float32, ties by the lower token. Where fewer than k tokens have a
        probability (a penalty of -inf and a small K), token -1 and -inf follow them; a row with NaN has tokens -1 and
        log-probs NaN. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction, penalty)
    validation.check_k(k, logits_ft.shape[-1])
    strength = validation.check_strength(mu, logits_ft)
    if isinstance(strength, Tensor):
        strength = strength.detach()
    return _STEER_TOPK(backend, (logits_pre, logits_ft, strength, k, alpha, penalty, direction))


def _run(logits_pre, logits_ft, mu, k, *arguments):
    check_tensors(logits_pre, logits_ft)
    validation.check_k(k, logits_ft.shape[-1])
    return runner("steer_topk")(logits_pre, logits_ft, mu, k, *arguments)


def _fake(logits_pre, logits_ft, mu, k, *_):
    check_tensors(logits_pre, logits_ft)
    return rows_like(logits_ft, torch.int64, k), rows_like(logits_ft, float_dtype(logits_pre, logits_ft), k)


_STEER_TOPK = Operator(
    "steer_topk",
    f"{PAIR}, Tensor mu, SymInt k, float alpha, float penalty, str direction",
    2,
    _run,
    _fake,
    watched=3,
)
