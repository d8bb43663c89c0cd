"""`fused_steer`: steered log-probs and the statistics of each row.

Notation as in `reference.py`: p = softmax(logits_ft), d = logits_ft - logits_pre, c = d - <p, d>, delta = p * c (or c),
K = the tokens with a logit of at least max + log(alpha). Every row (last dimension) stands for itself: a row with NaN or
+inf, or with all entries -inf in one of its inputs, has NaN results and leaves the others alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svdecode.constants import ALPHA, EPS, KL, PENALTY, BackendName, Direction
from svdecode.ops import validation
from svdecode.ops.backends import implementation
from svdecode.ops.torch_library import (
    NEEDS,
    PAIR,
    SETTINGS,
    Operator,
    check_tensors,
    float_dtype,
    is_forward_mode,
    is_watched,
    logits_grads_like,
    needed,
    present,
    rows_like,
    runner,
    save,
    saved_like,
)


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
    direction: Direction = KL,
    eps: float = EPS,
    return_kl: bool = True,
    out: Tensor | None = None,
    backend: BackendName | None = None,
) -> SteerOutput:
    """Steered log-probabilities and the statistics of each row (arXiv 2509.15888, Eq. 10 to 20, 41 and Algorithm 1).

        zs_v = z_v + mu * delta_v        for v in K
               z_v + |mu| * penalty      otherwise
        logprobs = log_softmax(zs)

    Differentiable in both logits and in `mu`; K is a constant. Second and forward-mode derivatives are computed by the
    reference, whatever the backend is. The inputs are never written to.

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
        return_kl: False leaves out the normaliser of the pre-trained model, which only the KL needs.
        out: (..., V) float32 tensor that receives the log-probabilities, in memory of its own. It cannot be used together
            with derivatives. Reusing it saves the cost of fresh memory in each call.
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
        validation.check_out(out, logits_pre, logits_ft)
        if is_forward_mode():
            raise ValueError("out cannot be used with forward-mode derivatives: leave out= away")
    arguments = (logits_pre, logits_ft, strength, labels, alpha, penalty, direction, eps, bool(return_kl))
    if out is None or not is_watched((logits_pre, logits_ft, strength, out)):
        result = _FUSED_STEER(backend, arguments, labels, (out, False))
    elif torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (*arguments, out)):
        raise ValueError("out cannot be used where a gradient is required: detach the inputs or leave out= away")
    else:
        result = (out, *_FUSED_STEER_OUT.through_torch(backend, (*arguments, out)))
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


_ARGUMENTS = f"{PAIR}, Tensor? mu, Tensor? labels, {SETTINGS}, bool return_kl"


def _run(logits_pre, logits_ft, mu, labels, alpha, penalty, direction, eps, return_kl, backend, out=None):
    check_tensors(logits_pre, logits_ft, labels)
    run = implementation(backend, "fused_steer")
    arguments = (logits_pre, logits_ft, mu, labels, alpha, penalty, direction, eps, return_kl, out)
    logprobs, strength, num_kept, *optional = run(*arguments)
    rest = (strength, num_kept, *(present(value, logits_ft) for value in optional))
    return rest if out is not None else (logprobs, *rest)


def _fake(logits_pre, logits_ft, mu, labels, alpha, penalty, direction, eps, return_kl, backend) -> tuple[Tensor, ...]:
    check_tensors(logits_pre, logits_ft, labels, values=False)
    dtype = float_dtype(logits_pre, logits_ft)
    has_labels = labels is not None
    return (
        rows_like(logits_ft, dtype, logits_ft.shape[-1]),
        rows_like(logits_ft, dtype),
        rows_like(logits_ft, torch.int32),
        present(rows_like(logits_ft, dtype) if return_kl else None, logits_ft),
        present(rows_like(logits_ft, dtype) if has_labels else None, logits_ft),
        present(rows_like(logits_ft, dtype, 3) if has_labels else None, logits_ft),
        saved_like(logits_ft, backend),
    )


def _without_out(arguments):
    """(the arguments of `fused_steer`, out) from those of `fused_steer_out`."""
    *rest, out, backend = arguments
    return (*rest, backend), out


def _run_out(*arguments):
    rest, out = _without_out(arguments)
    return _run(*rest, out=out)  # pyright: ignore[reportCallIssue]


def _setup_context(ctx, inputs, output) -> None:
    logits_pre, logits_ft, mu, labels, *settings, _return_kl, backend = inputs
    _, strength, num_kept, kl, _, moments, saved = output
    ctx.mark_non_differentiable(num_kept, saved)
    save(ctx, (logits_pre, logits_ft, mu, labels, strength, kl, moments, saved), (settings, backend))


def _autograd(ctx, grad_logprobs, grad_mu, _num_kept, grad_kl, grad_mu_star, grad_moments, _saved):
    logits_pre, logits_ft, mu, labels, *outputs = ctx.saved_tensors
    settings, backend = ctx.settings
    label_grads = (None, None) if labels is None else (grad_mu_star, grad_moments)
    *grads, grad_strength = FUSED_STEER_BACKWARD.derivative(
        *(grad_logprobs, grad_mu, grad_kl, *label_grads),
        *(logits_pre, logits_ft, mu, labels, *outputs),
        *(*settings, *ctx.needs_input_grad[:2]),
        backend=backend,
    )
    mu_grad = None
    if mu is not None and ctx.needs_input_grad[2]:
        mu_grad = grad_strength.sum_to_size(mu.shape).to(mu)
    return (*needed(ctx, grads), mu_grad, *(None,) * 7)


def _backward_fake(*arguments):
    logits_pre, logits_ft, need_pre, need_ft = *arguments[5:7], *arguments[-3:-1]
    row = rows_like(logits_ft, float_dtype(logits_pre, logits_ft))
    return (*logits_grads_like(logits_pre, logits_ft, need_pre, need_ft), row)


_FUSED_STEER = Operator("fused_steer", _ARGUMENTS, 7, _run, _fake, _autograd, _setup_context, watched=3)
_FUSED_STEER_OUT = Operator(
    "fused_steer_out",
    f"{_ARGUMENTS}, Tensor(a!) out",
    6,
    _run_out,
    lambda *arguments: _fake(*_without_out(arguments)[0])[1:],  # pyright: ignore[reportCallIssue]
    watched=3,
)
FUSED_STEER_BACKWARD = Operator(
    "fused_steer_backward",
    "Tensor? grad_logprobs, Tensor? grad_mu, Tensor? grad_kl, Tensor? grad_mu_star, Tensor? grad_moments, "
    f"{PAIR}, Tensor? mu, Tensor? labels, Tensor strength, Tensor kl, Tensor moments, Tensor saved, {SETTINGS}, {NEEDS}",
    3,
    runner("fused_steer_backward"),
    _backward_fake,
)
"""Also the backward of `optimal_strength`, whose results are among those of `fused_steer`."""
