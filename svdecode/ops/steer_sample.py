"""`steer_sample`: one token per row, drawn from the steered distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from svdecode.constants import ALPHA, KL, PENALTY, BackendName, Direction
from svdecode.ops import validation
from svdecode.ops.torch_library import PAIR, Operator, check_tensors, float_dtype, rows_like, runner


def steer_sample(
    logits_pre: Tensor,
    logits_ft: Tensor,
    mu: float | Tensor = 1.0,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    alpha: float = ALPHA,
    penalty: float = PENALTY,
    direction: Direction = KL,
    generator: torch.Generator | None = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from the steered distribution.

    The draw inverts the cumulative distribution, in the order of token ids, at one uniform number per row from
    `generator`. Truncation follows transformers: temperature, then top_k, then top_p; tokens that tie with the last kept
    one stay.

    Args:
        logits_pre: (..., V) logits of the pre-trained model.
        logits_ft: (..., V) logits of the warm-started model.
        mu: steering strength, a number or a tensor that broadcasts to (...).
        temperature: divides the steered log-probs; 0 is greedy, ties to the lowest id.
        top_k: keep the k most probable tokens; None for all.
        top_p: then keep the most probable tokens until their mass reaches top_p; None for all.
        alpha: confidence threshold in [0, 1].
        penalty: lambda <= 0 for tokens outside K.
        direction: "kl" or "log_ratio".
        generator: source of randomness, on the device of the logits; None for torch's own.
        backend: "reference", "cpu", "triton", "cuda", or None to pick by device (see `svdecode.backends`).

    Returns:
        tokens (...) int64 and logprobs (...) float32, the steered log-probability of each token before temperature and
        truncation. A row with NaN, or with nothing to choose, gives token -1 and log-probability NaN.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction, penalty)
    validation.check_sampling(temperature, top_k, top_p)
    strength = validation.check_strength(mu, logits_ft)
    if isinstance(strength, Tensor):
        strength = strength.detach()  # a draw has no gradient
    uniform = None  # greedy reads none
    if temperature != 0:
        shape, device = logits_ft.shape[:-1], logits_ft.device
        uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
    settings = (uniform, temperature, top_k, top_p, alpha, penalty, direction)
    return _STEER_SAMPLE(backend, (logits_pre, logits_ft, strength, *settings))


def _run(logits_pre, logits_ft, mu, uniform, temperature, *arguments):
    check_tensors(logits_pre, logits_ft)
    if uniform is None and temperature != 0:
        raise ValueError("uniform must be a tensor where the temperature is not 0")
    return runner("steer_sample")(logits_pre, logits_ft, mu, uniform, temperature, *arguments)


def _fake(logits_pre, logits_ft, *_):
    check_tensors(logits_pre, logits_ft)
    return rows_like(logits_ft, torch.int64), rows_like(logits_ft, float_dtype(logits_pre, logits_ft))


_STEER_SAMPLE = Operator(
    "steer_sample",
    f"{PAIR}, Tensor mu, Tensor? uniform, float temperature, int? top_k, float? top_p, float alpha, float penalty, "
    "str direction",
    2,
    _run,
    _fake,
    watched=3,
)
