"""The public operators: they check and normalise their arguments, then call `torch.ops.svdecode`.

Notation as in `reference.py`: p = softmax(logits_ft), d = logits_ft - logits_pre, c = d - <p, d>, delta = p * c (or c),
K = the tokens with a logit of at least max + log(alpha). Every row (last dimension) stands for itself: a row with NaN or
+inf, or with all entries -inf in one of its inputs, has NaN results and leaves the others alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svdecode import registration, validation  # noqa: F401  (registration defines torch.ops.svdecode)
from svdecode.constants import ALPHA, EPS, KL, PENALTY
from svdecode.dispatch import backend_for, call, is_watched, runner_for
from svdecode.strength import as_tensor


class SteerOutput(NamedTuple):
    """What `fused_steer` returns. `...` are the leading dimensions of the logits, V is the vocabulary."""

    logprobs: Tensor
    """(..., V) float32: log-probabilities of the steered distribution, -inf where nothing is left."""
    mu: Tensor
    """(...) float32: the strength used."""
    num_kept: Tensor
    """(...) int32: the size of the kept set K."""
    kl: Tensor | None
    """(...) float32, nats: KL(p_ft || p_pre); +inf where p_pre = 0 < p_ft. None with return_kl=False."""
    mu_star: Tensor | None
    """(...) float32: optimal strength N / (D + eps), 0 where the label is ignored. None without labels."""
    moments: Tensor | None
    """(..., 3) float32: N, D, H. None without labels."""


def fused_steer(
    logits_pre: Tensor,
    logits_ft: Tensor,
    mu: float | Tensor | None = None,
    *,
    labels: Tensor | None = None,
    alpha: float = ALPHA,
    penalty: float = PENALTY,
    direction: str = KL,
    eps: float = EPS,
    return_kl: bool = True,
    out: Tensor | None = None,
    backend: str | None = None,
) -> SteerOutput:
    """Steered log-probabilities and the statistics of each row (arXiv 2509.15888, Eq. 10 to 20, 41 and Algorithm 1).

        zs_v = z_v + mu * delta_v        for v in K
               z_v + |mu| * penalty      otherwise
        logprobs = log_softmax(zs)

    Differentiable in both logits and in `mu`; K is a constant. The inputs are never written to.

    Args:
        logits_pre: (..., V) float32, bfloat16 or float16 (float64 on the reference backend), of the pre-trained model.
        logits_ft: (..., V), of the warm-started model; may have another dtype.
        mu: steering strength, a finite number or a floating-point tensor that broadcasts to (...). Left out, it is
            `mu_star` where `labels` are given, else 1.0.
        labels: (...) int64 or int32 gold tokens, -100 for positions that take no part.
        alpha: confidence threshold in [0, 1]; 0 keeps every token, 1 the arg max.
        penalty: lambda <= 0, added (times |mu|) to tokens outside K; -inf removes them whatever mu is.
        direction: "kl" for delta = p * c, "log_ratio" for delta = c.
        eps: added to the denominator of `mu_star`.
        return_kl: False spares the normaliser of the pre-trained model, which only the KL needs.
        out: (..., V) float32 tensor that receives the log-probabilities; not together with gradients.
        backend: "reference", "cpu", "triton", "cuda", or None to pick by device (see `svdecode.backends`).

    Raises:
        TypeError, ValueError: naming the argument, before any work. Labels out of range are found on a CPU; on a GPU
            they give NaN in their row.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction, penalty, eps)
    if labels is not None:
        validation.check_labels(labels, logits_ft)
    strength = None if mu is None else validation.check_strength(mu, logits_ft)
    if strength is None and labels is None:
        strength = 1.0
    if out is not None:
        validation.check_out(out, logits_ft)
    settings = (alpha, penalty, direction, eps, bool(return_kl))
    if is_watched(logits_pre, logits_ft, strength, out):
        name = backend_for(backend, logits_pre, logits_ft)
        arguments = (logits_pre, logits_ft, as_tensor(strength), labels, *settings, name)
        if out is None:
            result = torch.ops.svdecode.fused_steer(*arguments)
        elif torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (*arguments, out)):
            raise ValueError("out cannot be used where a gradient is required: detach the inputs or leave out= away")
        else:
            result = (out, *torch.ops.svdecode.fused_steer_out(out, *arguments))
    else:
        if labels is not None:
            validation.check_label_range(labels, logits_ft.shape[-1])
        run = runner_for("fused_steer", backend, logits_pre, logits_ft)
        result = run(logits_pre, logits_ft, strength, labels, *settings, out, False)
    logprobs, used, num_kept, kl, mu_star, moments, _ = result
    has_labels = labels is not None
    return SteerOutput(
        logprobs,
        used,
        num_kept,
        kl if return_kl else None,
        mu_star if has_labels else None,
        moments if has_labels else None,
    )


def steering_vector(logits_pre: Tensor, logits_ft: Tensor, *, alpha: float = 0.0, direction: str = KL) -> Tensor:
    """(..., V) float32: delta = J(p) grad KL(p || p_pre) = p * c on K, 0 elsewhere (Eq. 10, pointing towards the task).

    With alpha = 0 the entries of a row sum to 0. Differentiable in both logits.

    Args:
        logits_pre: (..., V) logits of the pre-trained model.
        logits_ft: (..., V) logits of the warm-started model.
        alpha: confidence threshold in [0, 1]; 0 keeps every token.
        direction: "kl" for delta = p * c, "log_ratio" for delta = c.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction)
    name = backend_for(None, logits_pre, logits_ft)
    return call("steering_vector", name, logits_pre, logits_ft, alpha, direction)[0]


def optimal_strength(
    logits_pre: Tensor,
    logits_ft: Tensor,
    labels: Tensor,
    *,
    alpha: float = ALPHA,
    direction: str = KL,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """The strength that a gold token asks for, mu* = N / (D + eps) (Eq. 41 / 43), and its moments; sums over K.

        N = [y in K] delta_y - sum p delta      D = sum delta^2      H = sum p delta^2 - (sum p delta)^2

    N / (H + eps) is the Newton step with the exact curvature. Nothing of size (..., V) is allocated by the kernels.

    Args:
        logits_pre: (..., V) logits of the pre-trained model.
        logits_ft: (..., V) logits of the warm-started model.
        labels: (...) int64 or int32 gold tokens; -100 gives zeros.
        alpha: confidence threshold in [0, 1].
        direction: "kl" or "log_ratio".
        eps: added to the denominator.

    Returns:
        mu_star (...) float32 and moments (..., 3) float32: N, D, H.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction, eps=eps)
    validation.check_labels(labels, logits_ft)
    name = backend_for(None, logits_pre, logits_ft)
    settings = (alpha, direction, eps)
    return call("optimal_strength", name, logits_pre, logits_ft, labels, *settings, labels=labels)[:2]


def steered_nll(
    logits_pre: Tensor,
    logits_ft: Tensor,
    labels: Tensor,
    mu: Tensor,
    *,
    alpha: float = ALPHA,
    penalty: float = PENALTY,
    direction: str = KL,
) -> Tensor:
    """(..., M) float32, nats: the NLL of the gold tokens under the distributions steered with each of M strengths.

    Convex in mu. +inf where a gold token lies outside K and the penalty is -inf, 0 where the label is ignored.
    Differentiable in both logits and in mu.

    Args:
        logits_pre: (..., V) logits of the pre-trained model.
        logits_ft: (..., V) logits of the warm-started model.
        labels: (...) int64 or int32 gold tokens, -100 ignored.
        mu: (M,) floating-point strengths.
        alpha: confidence threshold in [0, 1].
        penalty: lambda <= 0 for tokens outside K.
        direction: "kl" or "log_ratio".
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction, penalty)
    validation.check_labels(labels, logits_ft)
    strengths = validation.check_strengths(mu, logits_ft)
    name = backend_for(None, logits_pre, logits_ft)
    settings = (alpha, penalty, direction)
    return call("steered_nll", name, logits_pre, logits_ft, labels, strengths, *settings, labels=labels)[0]


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
    direction: str = KL,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row from the steered distribution.

    The draw inverts the cumulative distribution, in the order of token ids, at one uniform number a row from
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

    Returns:
        tokens (...) int64 and logprobs (...) float32, the steered log-probability of each token before temperature and
        truncation. A row with NaN, or with nothing to choose, gives token -1 and log-probability NaN.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction, penalty)
    validation.check_sampling(temperature, top_k, top_p)
    strength = validation.check_strength(mu, logits_ft)
    if isinstance(strength, Tensor):
        strength = strength.detach()  # a draw has no gradient
    if temperature == 0:
        uniform = logits_ft.new_empty((0,), dtype=torch.float32)  # not read
    else:
        uniform = torch.rand(logits_ft.shape[:-1], generator=generator, device=logits_ft.device)
    settings = (uniform, temperature, top_k, top_p, alpha, penalty, direction)
    if is_watched(logits_pre, logits_ft, strength):
        name = backend_for(None, logits_pre, logits_ft)
        return torch.ops.svdecode.steer_sample(logits_pre, logits_ft, as_tensor(strength), *settings, name)
    return runner_for("steer_sample", None, logits_pre, logits_ft)(logits_pre, logits_ft, strength, *settings)


def steer_topk(
    logits_pre: Tensor,
    logits_ft: Tensor,
    mu: float | Tensor = 1.0,
    *,
    k: int,
    alpha: float = ALPHA,
    penalty: float = PENALTY,
    direction: str = KL,
) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of the steered distribution (Eq. 10 to 20), best first: what a beam search needs of a step.

    The kernels write nothing of size (..., V): the best token of each piece of a row is known from its statistics, and k times
    the best of them is taken and replaced by its piece's next one.

    Args:
        logits_pre: (..., V) logits of the pre-trained model.
        logits_ft: (..., V) logits of the warm-started model.
        mu: steering strength, a number or a tensor that broadcasts to (...).
        k: how many tokens, 1 to V.
        alpha: confidence threshold in [0, 1].
        penalty: lambda <= 0 for tokens outside K.
        direction: "kl" or "log_ratio".

    Returns:
        tokens (..., k) int64 and logprobs (..., k) float32, ties by the lower token. Where fewer than k tokens have a
        probability (a penalty of -inf and a small K), token -1 and -inf follow them; a row with NaN has tokens -1 and
        log-probs NaN. No gradient.
    """
    validation.check_logits(logits_pre, logits_ft)
    validation.check_settings(alpha, direction, penalty)
    validation.check_k(k, logits_ft.shape[-1])
    strength = validation.check_strength(mu, logits_ft)
    if isinstance(strength, Tensor):
        strength = strength.detach()
    settings = (k, alpha, penalty, direction)
    if is_watched(logits_pre, logits_ft, strength):
        name = backend_for(None, logits_pre, logits_ft)
        return torch.ops.svdecode.steer_topk(logits_pre, logits_ft, as_tensor(strength), *settings, name)
    return runner_for("steer_topk", None, logits_pre, logits_ft)(logits_pre, logits_ft, strength, *settings)
