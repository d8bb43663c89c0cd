"""The operators under `torch.ops.svdecode`, one section each; `registry.py` says how."""

from __future__ import annotations

import torch

from svdecode import validation
from svdecode.backends import implementation
from svdecode.registry import (
    define,
    float_dtype,
    logits_grads_like,
    needed,
    present,
    rows_like,
    runner,
    save,
    saved_like,
)

_SETTINGS = "float alpha, float penalty, str direction, float eps"
_PAIR = "Tensor logits_pre, Tensor logits_ft"
_NEEDS = "bool need_pre, bool need_ft"
_OPS = torch.ops.svdecode


def _checked(logits_pre, logits_ft, labels=None, values=True):
    validation.check_logits(logits_pre, logits_ft)
    if labels is not None:
        validation.check_labels(labels, logits_ft)
        if values:  # a fake has none
            validation.check_label_range(labels, logits_ft.shape[-1])


# fused_steer ------------------------------------------------------------------------------------------------------------

_STEER = f"{_PAIR}, Tensor? mu, Tensor? labels, {_SETTINGS}, bool return_kl"


def _fused_steer(logits_pre, logits_ft, mu, labels, alpha, penalty, direction, eps, return_kl, backend, out=None):
    _checked(logits_pre, logits_ft, labels)
    run = implementation(backend, "fused_steer")
    arguments = (logits_pre, logits_ft, mu, labels, alpha, penalty, direction, eps, return_kl, out)
    logprobs, strength, num_kept, *optional = run(*arguments)
    rest = (strength, num_kept, *(present(value, logits_ft) for value in optional))
    return rest if out is not None else (logprobs, *rest)


def _fused_steer_fake(logits_pre, logits_ft, mu, labels, alpha, penalty, direction, eps, return_kl, backend):
    _checked(logits_pre, logits_ft, labels, values=False)
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


def _fused_steer_context(ctx, inputs, output) -> None:
    logits_pre, logits_ft, mu, labels, *settings, _return_kl, backend = inputs
    _, strength, num_kept, kl, _, moments, saved = output
    ctx.mark_non_differentiable(num_kept, saved)
    save(ctx, (logits_pre, logits_ft, mu, labels, strength, kl, moments, saved), (settings, backend))


def _fused_steer_autograd(ctx, grad_logprobs, grad_mu, _num_kept, grad_kl, grad_mu_star, grad_moments, _saved):
    logits_pre, logits_ft, mu, labels, *outputs = ctx.saved_tensors
    settings, backend = ctx.settings
    label_grads = (None, None) if labels is None else (grad_mu_star, grad_moments)
    *grads, grad_strength = _OPS.fused_steer_backward(
        *(grad_logprobs, grad_mu, grad_kl, *label_grads),
        *(logits_pre, logits_ft, mu, labels, *outputs),
        *(*settings, *ctx.needs_input_grad[:2], backend),
    )
    needs_mu = mu is not None and ctx.needs_input_grad[2]
    mu_grad = grad_strength.sum_to_size(mu.shape).to(mu) if needs_mu else None
    return (*needed(ctx, grads), mu_grad, *(None,) * 7)


_STEER_RESULTS = ("Tensor",) * 7
define(
    "fused_steer",
    _STEER,
    f"({', '.join(_STEER_RESULTS)})",
    _fused_steer,
    _fused_steer_fake,
    _fused_steer_autograd,
    _fused_steer_context,
)
define(
    "fused_steer_out",
    f"Tensor(a!) out, {_STEER}",
    f"({', '.join(_STEER_RESULTS[1:])})",
    lambda out, *arguments: _fused_steer(*arguments, out=out),
    lambda out, *arguments: _fused_steer_fake(*arguments)[1:],
)


def _fused_steer_backward_fake(*arguments):
    logits_pre, logits_ft, need_pre, need_ft = *arguments[5:7], *arguments[-3:-1]
    row = rows_like(logits_ft, float_dtype(logits_pre, logits_ft))
    return (*logits_grads_like(logits_pre, logits_ft, need_pre, need_ft), row)


define(
    "fused_steer_backward",
    "Tensor? grad_logprobs, Tensor? grad_mu, Tensor? grad_kl, Tensor? grad_mu_star, Tensor? grad_moments, "
    f"{_PAIR}, Tensor? mu, Tensor? labels, Tensor strength, Tensor kl, Tensor moments, Tensor saved, {_SETTINGS}, {_NEEDS}",
    "(Tensor, Tensor, Tensor)",
    runner("fused_steer_backward"),
    _fused_steer_backward_fake,
)


# steering_vector --------------------------------------------------------------------------------------------------------


def _steering_vector(logits_pre, logits_ft, alpha, direction, backend):
    _checked(logits_pre, logits_ft)
    delta, saved = implementation(backend, "steering_vector")(logits_pre, logits_ft, alpha, direction)
    return delta, present(saved, logits_ft)


def _steering_vector_fake(logits_pre, logits_ft, alpha, direction, backend):
    _checked(logits_pre, logits_ft)
    return rows_like(logits_ft, float_dtype(logits_pre, logits_ft), logits_ft.shape[-1]), saved_like(logits_ft, backend)


def _steering_vector_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    save(ctx, (*inputs[:2], output[1]), inputs[2:])


def _steering_vector_autograd(ctx, grad_delta, _saved):
    if grad_delta is None:
        return (None,) * 5
    *settings, backend = ctx.settings
    needs = ctx.needs_input_grad[:2]
    grads = _OPS.steering_vector_backward(grad_delta, *ctx.saved_tensors, *settings, *needs, backend)
    return (*needed(ctx, grads), None, None, None)


define(
    "steering_vector",
    f"{_PAIR}, float alpha, str direction",
    "(Tensor, Tensor)",
    _steering_vector,
    _steering_vector_fake,
    _steering_vector_autograd,
    _steering_vector_context,
)
define(
    "steering_vector_backward",
    f"Tensor grad_delta, {_PAIR}, Tensor saved, float alpha, str direction, {_NEEDS}",
    "(Tensor, Tensor)",
    runner("steering_vector_backward"),
    lambda *arguments: tuple(logits_grads_like(*arguments[1:3], *arguments[-3:-1])),
)


# optimal_strength -------------------------------------------------------------------------------------------------------


def _optimal_strength(logits_pre, logits_ft, labels, alpha, direction, eps, backend):
    _checked(logits_pre, logits_ft, labels)
    run = implementation(backend, "optimal_strength")
    mu_star, moments, saved = run(logits_pre, logits_ft, labels, alpha, direction, eps)
    return mu_star, moments, present(saved, logits_ft)


def _optimal_strength_fake(logits_pre, logits_ft, labels, alpha, direction, eps, backend):
    _checked(logits_pre, logits_ft, labels, values=False)
    dtype = float_dtype(logits_pre, logits_ft)
    return rows_like(logits_ft, dtype), rows_like(logits_ft, dtype, 3), saved_like(logits_ft, backend)


def _optimal_strength_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[2])
    save(ctx, (*inputs[:3], *output), inputs[3:])


def _optimal_strength_autograd(ctx, grad_mu_star, grad_moments, _saved):
    logits_pre, logits_ft, labels, mu_star, moments, saved = ctx.saved_tensors
    alpha, direction, eps, backend = ctx.settings
    # The moments do not depend on the penalty, and without a gradient of log-probs nothing else does either.
    *grads, _ = _OPS.fused_steer_backward(
        *(None, None, None, grad_mu_star, grad_moments),
        *(logits_pre, logits_ft, None, labels, mu_star, present(None, logits_ft), moments, saved),
        *(alpha, 0.0, direction, eps, *ctx.needs_input_grad[:2], backend),
    )
    return (*needed(ctx, grads), *(None,) * 5)


define(
    "optimal_strength",
    f"{_PAIR}, Tensor labels, float alpha, str direction, float eps",
    "(Tensor, Tensor, Tensor)",
    _optimal_strength,
    _optimal_strength_fake,
    _optimal_strength_autograd,
    _optimal_strength_context,
)


# steered_nll ------------------------------------------------------------------------------------------------------------


def _steered_nll(logits_pre, logits_ft, labels, mu, alpha, penalty, direction, backend):
    _checked(logits_pre, logits_ft, labels)
    run = implementation(backend, "steered_nll")
    nll, saved = run(logits_pre, logits_ft, labels, mu, alpha, penalty, direction)
    return nll, present(saved, logits_ft)


def _steered_nll_fake(logits_pre, logits_ft, labels, mu, alpha, penalty, direction, backend):
    _checked(logits_pre, logits_ft, labels, values=False)
    nll = rows_like(logits_ft, float_dtype(logits_pre, logits_ft), mu.shape[0])
    return nll, saved_like(logits_ft, backend)


def _steered_nll_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    save(ctx, (*inputs[:4], *output), inputs[4:])


def _steered_nll_autograd(ctx, grad_nll, _saved):
    if grad_nll is None:
        return (None,) * 8
    *settings, backend = ctx.settings
    *grads, grad_mu = _OPS.steered_nll_backward(
        grad_nll, *ctx.saved_tensors, *settings, *ctx.needs_input_grad[:2], backend
    )
    mu_grad = grad_mu.to(ctx.saved_tensors[3].dtype) if ctx.needs_input_grad[3] else None
    return (*needed(ctx, grads), None, mu_grad, *(None,) * 4)


define(
    "steered_nll",
    f"{_PAIR}, Tensor labels, Tensor mu, float alpha, float penalty, str direction",
    "(Tensor, Tensor)",
    _steered_nll,
    _steered_nll_fake,
    _steered_nll_autograd,
    _steered_nll_context,
)


def _steered_nll_backward_fake(grad_nll, logits_pre, logits_ft, labels, mu, nll, saved, *settings):
    grad_mu = mu.new_empty(mu.shape, dtype=float_dtype(logits_pre, logits_ft))
    return (*logits_grads_like(logits_pre, logits_ft, *settings[-3:-1]), grad_mu)


define(
    "steered_nll_backward",
    f"Tensor grad_nll, {_PAIR}, Tensor labels, Tensor mu, Tensor nll, Tensor saved, "
    f"float alpha, float penalty, str direction, {_NEEDS}",
    "(Tensor, Tensor, Tensor)",
    runner("steered_nll_backward"),
    _steered_nll_backward_fake,
)


# steer_sample -----------------------------------------------------------------------------------------------------------


def _steer_sample(logits_pre, logits_ft, *arguments):
    _checked(logits_pre, logits_ft)
    return runner("steer_sample")(logits_pre, logits_ft, *arguments)


def _steer_sample_fake(logits_pre, logits_ft, *_):
    _checked(logits_pre, logits_ft)
    return rows_like(logits_ft, torch.int64), rows_like(logits_ft, float_dtype(logits_pre, logits_ft))


define(
    "steer_sample",
    f"{_PAIR}, Tensor mu, Tensor uniform, float temperature, int? top_k, float? top_p, float alpha, float penalty, "
    "str direction",
    "(Tensor, Tensor)",
    _steer_sample,
    _steer_sample_fake,
)


# steer_topk -------------------------------------------------------------------------------------------------------------


def _steer_topk(logits_pre, logits_ft, mu, k, *arguments):
    _checked(logits_pre, logits_ft)
    validation.check_k(k, logits_ft.shape[-1])
    return runner("steer_topk")(logits_pre, logits_ft, mu, k, *arguments)


def _steer_topk_fake(logits_pre, logits_ft, mu, k, *_):
    _checked(logits_pre, logits_ft)
    return rows_like(logits_ft, torch.int64, k), rows_like(logits_ft, float_dtype(logits_pre, logits_ft), k)


define(
    "steer_topk",
    f"{_PAIR}, Tensor mu, SymInt k, float alpha, float penalty, str direction",
    "(Tensor, Tensor)",
    _steer_topk,
    _steer_topk_fake,
)
