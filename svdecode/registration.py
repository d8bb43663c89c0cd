"""The operators under `torch.ops.svdecode`: schemas, implementations, fakes and autograd.

`Library.impl` costs 1.3 us a call where `torch.library.custom_op` costs 7 to 10 us, hence the former. Every schema ends in
the name of the backend, which the public functions of `ops.py` resolve. A tensor that a call does not ask for comes back
with shape (0,), since a schema cannot return an optional tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdecode import validation
from svdecode.backends import implementation

_LIBRARY = torch.library.Library("svdecode", "DEF")
_SETTINGS = "float alpha, float penalty, str direction, float eps"


def _float_dtype(logits_pre: Tensor, logits_ft: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (logits_pre.dtype, logits_ft.dtype) else torch.float32


def _rows_like(logits: Tensor, dtype: torch.dtype, *trailing: int) -> Tensor:
    return logits.new_empty((*logits.shape[:-1], *trailing), dtype=dtype)


def _present(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if value is None else value


def _define(name: str, arguments: str, results: str, run, fake, backward=None, setup_context=None) -> None:
    _LIBRARY.define(f"{name}({arguments}, str backend) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"svdecode::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"svdecode::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def _save(ctx, tensors: tuple[Tensor | None, ...], settings: tuple) -> None:
    ctx.set_materialize_grads(False)  # an output that no loss uses costs no (..., V) tensor of zeros
    ctx.save_for_backward(*tensors)
    ctx.settings = settings


def _grads(ctx, logits: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of the logits, None where none is needed."""
    needed = ctx.needs_input_grad[:2]
    return tuple(g.to(x.dtype) if need else None for x, g, need in zip(logits, grads, needed, strict=True))


# fused_steer ------------------------------------------------------------------------------------------------------------

_STEER = f"Tensor logits_pre, Tensor logits_ft, Tensor? mu, Tensor? labels, {_SETTINGS}, bool return_kl"


def _check_steer(logits_pre: Tensor, logits_ft: Tensor, labels: Tensor | None) -> None:
    validation.check_logits(logits_pre, logits_ft)
    if labels is not None:
        validation.check_labels(labels, logits_ft)


def _fused_steer(logits_pre, logits_ft, mu, labels, alpha, penalty, direction, eps, return_kl, backend, out=None):
    _check_steer(logits_pre, logits_ft, labels)
    if labels is not None:
        validation.check_label_range(labels, logits_ft.shape[-1])
    run = implementation(backend, "fused_steer")
    logprobs, strength, num_kept, kl, mu_star, moments = run(
        logits_pre, logits_ft, mu, labels, alpha, penalty, direction, eps, return_kl, out
    )
    rest = (strength, num_kept, *(_present(value, logits_ft) for value in (kl, mu_star, moments)))
    return rest if out is not None else (logprobs, *rest)


def _fused_steer_fake(logits_pre, logits_ft, mu, labels, alpha, penalty, direction, eps, return_kl, backend):
    _check_steer(logits_pre, logits_ft, labels)
    dtype = _float_dtype(logits_pre, logits_ft)
    row = _rows_like(logits_ft, dtype)
    return (
        _rows_like(logits_ft, dtype, logits_ft.shape[-1]),
        row,
        _rows_like(logits_ft, torch.int32),
        _present(torch.empty_like(row) if return_kl else None, row),
        _present(torch.empty_like(row) if labels is not None else None, row),
        _present(_rows_like(logits_ft, dtype, 3) if labels is not None else None, row),
    )


def _fused_steer_context(ctx, inputs, output) -> None:
    logits_pre, logits_ft, mu, labels, *settings, _return_kl, backend = inputs
    ctx.mark_non_differentiable(output[2])
    _save(ctx, (logits_pre, logits_ft, mu, labels), (*settings, backend))


def _fused_steer_autograd(ctx, grad_logprobs, grad_mu, _num_kept, grad_kl, grad_mu_star, grad_moments):
    logits_pre, logits_ft, mu, labels = ctx.saved_tensors
    *logit_grads, grad_strength = torch.ops.svdecode.fused_steer_backward(
        grad_logprobs,
        grad_mu,
        grad_kl,
        None if labels is None else grad_mu_star,
        None if labels is None else grad_moments,
        *(logits_pre, logits_ft, mu, labels),
        *ctx.settings,
    )
    if mu is not None and ctx.needs_input_grad[2]:
        mu_grad = grad_strength.sum_to_size(mu.shape).to(mu)
    else:
        mu_grad = None
    return (*_grads(ctx, (logits_pre, logits_ft), logit_grads), mu_grad, *(None,) * 7)


_define(
    "fused_steer",
    _STEER,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fused_steer,
    _fused_steer_fake,
    _fused_steer_autograd,
    _fused_steer_context,
)


def _fused_steer_out(out, *arguments):
    return _fused_steer(*arguments, out=out)


def _fused_steer_out_fake(out, *arguments):
    return _fused_steer_fake(*arguments)[1:]


_define(
    "fused_steer_out",
    f"Tensor(a!) out, {_STEER}",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fused_steer_out,
    _fused_steer_out_fake,
)


def _fused_steer_backward(*arguments):
    *arguments, backend = arguments
    return implementation(backend, "fused_steer_backward")(*arguments)


def _fused_steer_backward_fake(grad_logprobs, grad_mu, grad_kl, grad_mu_star, grad_moments, logits_pre, logits_ft, *_):
    dtype = _float_dtype(logits_pre, logits_ft)
    vocabulary = logits_ft.shape[-1]
    return (
        _rows_like(logits_ft, dtype, vocabulary),
        _rows_like(logits_ft, dtype, vocabulary),
        _rows_like(logits_ft, dtype),
    )


_define(
    "fused_steer_backward",
    "Tensor? grad_logprobs, Tensor? grad_mu, Tensor? grad_kl, Tensor? grad_mu_star, Tensor? grad_moments, "
    f"Tensor logits_pre, Tensor logits_ft, Tensor? mu, Tensor? labels, {_SETTINGS}",
    "(Tensor, Tensor, Tensor)",
    _fused_steer_backward,
    _fused_steer_backward_fake,
)


# steering_vector --------------------------------------------------------------------------------------------------------

_PAIR = "Tensor logits_pre, Tensor logits_ft"


def _steering_vector(logits_pre, logits_ft, alpha, direction, backend):
    validation.check_logits(logits_pre, logits_ft)
    return implementation(backend, "steering_vector")(logits_pre, logits_ft, alpha, direction)


def _steering_vector_fake(logits_pre, logits_ft, alpha, direction, backend):
    validation.check_logits(logits_pre, logits_ft)
    return _rows_like(logits_ft, _float_dtype(logits_pre, logits_ft), logits_ft.shape[-1])


def _steering_vector_context(ctx, inputs, output) -> None:
    _save(ctx, inputs[:2], inputs[2:])


def _steering_vector_autograd(ctx, grad_delta):
    if grad_delta is None:
        return (None,) * 5
    grads = torch.ops.svdecode.steering_vector_backward(grad_delta, *ctx.saved_tensors, *ctx.settings)
    return (*_grads(ctx, ctx.saved_tensors, grads), None, None, None)


_define(
    "steering_vector",
    f"{_PAIR}, float alpha, str direction",
    "Tensor",
    _steering_vector,
    _steering_vector_fake,
    _steering_vector_autograd,
    _steering_vector_context,
)


def _steering_vector_backward(*arguments):
    *arguments, backend = arguments
    return implementation(backend, "steering_vector_backward")(*arguments)


def _steering_vector_backward_fake(grad_delta, logits_pre, logits_ft, alpha, direction, backend):
    return tuple(_steering_vector_fake(logits_pre, logits_ft, alpha, direction, backend) for _ in range(2))


_define(
    "steering_vector_backward",
    f"Tensor grad_delta, {_PAIR}, float alpha, str direction",
    "(Tensor, Tensor)",
    _steering_vector_backward,
    _steering_vector_backward_fake,
)


# optimal_strength -------------------------------------------------------------------------------------------------------


def _optimal_strength(logits_pre, logits_ft, labels, alpha, direction, eps, backend):
    _check_steer(logits_pre, logits_ft, labels)
    validation.check_label_range(labels, logits_ft.shape[-1])
    return implementation(backend, "optimal_strength")(logits_pre, logits_ft, labels, alpha, direction, eps)


def _optimal_strength_fake(logits_pre, logits_ft, labels, alpha, direction, eps, backend):
    _check_steer(logits_pre, logits_ft, labels)
    dtype = _float_dtype(logits_pre, logits_ft)
    return _rows_like(logits_ft, dtype), _rows_like(logits_ft, dtype, 3)


def _optimal_strength_context(ctx, inputs, output) -> None:
    _save(ctx, inputs[:3], inputs[3:])


def _optimal_strength_autograd(ctx, grad_mu_star, grad_moments):
    logits_pre, logits_ft, labels = ctx.saved_tensors
    alpha, direction, eps, backend = ctx.settings
    # The moments do not depend on the penalty, and without a gradient of log-probs nothing else does either.
    *grads, _ = torch.ops.svdecode.fused_steer_backward(
        None, None, None, grad_mu_star, grad_moments, logits_pre, logits_ft, None, labels, alpha, 0.0, direction, eps, backend
    )
    return (*_grads(ctx, (logits_pre, logits_ft), grads), *(None,) * 5)


_define(
    "optimal_strength",
    f"{_PAIR}, Tensor labels, float alpha, str direction, float eps",
    "(Tensor, Tensor)",
    _optimal_strength,
    _optimal_strength_fake,
    _optimal_strength_autograd,
    _optimal_strength_context,
)


# steered_nll ------------------------------------------------------------------------------------------------------------

_NLL = f"{_PAIR}, Tensor labels, Tensor mu, float alpha, float penalty, str direction"


def _steered_nll(logits_pre, logits_ft, labels, mu, alpha, penalty, direction, backend):
    _check_steer(logits_pre, logits_ft, labels)
    validation.check_label_range(labels, logits_ft.shape[-1])
    run = implementation(backend, "steered_nll")
    return run(logits_pre, logits_ft, labels, mu, alpha, penalty, direction)


def _steered_nll_fake(logits_pre, logits_ft, labels, mu, alpha, penalty, direction, backend):
    _check_steer(logits_pre, logits_ft, labels)
    return _rows_like(logits_ft, _float_dtype(logits_pre, logits_ft), mu.shape[0])


def _steered_nll_context(ctx, inputs, output) -> None:
    _save(ctx, inputs[:4], inputs[4:])


def _steered_nll_autograd(ctx, grad_nll):
    logits_pre, logits_ft, labels, mu = ctx.saved_tensors
    if grad_nll is None:
        return (None,) * 8
    *grads, grad_mu = torch.ops.svdecode.steered_nll_backward(
        grad_nll, logits_pre, logits_ft, labels, mu, *ctx.settings
    )
    mu_grad = grad_mu.to(mu.dtype) if ctx.needs_input_grad[3] else None
    return (*_grads(ctx, (logits_pre, logits_ft), grads), None, mu_grad, *(None,) * 4)


_define(
    "steered_nll",
    _NLL,
    "Tensor",
    _steered_nll,
    _steered_nll_fake,
    _steered_nll_autograd,
    _steered_nll_context,
)


def _steered_nll_backward(*arguments):
    *arguments, backend = arguments
    return implementation(backend, "steered_nll_backward")(*arguments)


def _steered_nll_backward_fake(grad_nll, logits_pre, logits_ft, labels, mu, alpha, penalty, direction, backend):
    dtype = _float_dtype(logits_pre, logits_ft)
    vocabulary = logits_ft.shape[-1]
    return (
        _rows_like(logits_ft, dtype, vocabulary),
        _rows_like(logits_ft, dtype, vocabulary),
        mu.new_empty(mu.shape, dtype=dtype),
    )


_define(
    "steered_nll_backward",
    f"Tensor grad_nll, {_NLL}",
    "(Tensor, Tensor, Tensor)",
    _steered_nll_backward,
    _steered_nll_backward_fake,
)


# steer_sample -----------------------------------------------------------------------------------------------------------


def _steer_sample(logits_pre, logits_ft, *arguments):
    *arguments, backend = arguments
    validation.check_logits(logits_pre, logits_ft)
    return implementation(backend, "steer_sample")(logits_pre, logits_ft, *arguments)


def _steer_sample_fake(logits_pre, logits_ft, *_):
    validation.check_logits(logits_pre, logits_ft)
    return _rows_like(logits_ft, torch.int64), _rows_like(logits_ft, _float_dtype(logits_pre, logits_ft))


_define(
    "steer_sample",
    f"{_PAIR}, Tensor mu, Tensor uniform, float temperature, int? top_k, float? top_p, float alpha, float penalty, "
    "str direction",
    "(Tensor, Tensor)",
    _steer_sample,
    _steer_sample_fake,
)
