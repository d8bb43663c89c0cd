"""The method in plain PyTorch: the specification as code, for any device, in fp32 and fp64.

Source: "Distribution-Aligned Decoding for Efficient LLM Task Adaptation", NeurIPS 2025, arXiv 2509.15888 (SVDecode).

    a, z    logits of the pre-trained and of the warm-started (fine-tuned) model, one vocabulary row each
    p       softmax(z)
    d       z - a
    dbar    <p, d>
    KL      dbar - (lse(z) - lse(a)) = KL(p || softmax(a))
    c       d - dbar
    delta   p * c = J(p) grad KL        the steering vector (direction "kl");  c alone is direction "log_ratio"
    K       { v : z_v >= max(z) + log(alpha) }
    zs      z + mu * delta on K, z + |mu| * penalty elsewhere
    out     log_softmax(zs)

Everything here is differentiable by autograd (K is a constant), which is what `reference_backward.py` is tested against.
Computation and results are float64 where an input is float64, else float32. The last result of an operator that has a
backward is None. Kernels keep some numbers of each row there; the reference computes everything again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from svdecode.constants import IGNORE_INDEX, KL


class Rows(NamedTuple):
    """What all operators need of (..., V) rows."""

    z: Tensor  # (..., V) logits of the fine-tuned model, upcast
    p: Tensor  # (..., V) softmax(z)
    delta: Tensor  # (..., V) steering vector, not masked
    kept: Tensor  # (..., V) bool, K
    kl: Tensor  # (...) KL(p || p_pre), +inf where p_pre = 0 < p
    invalid: Tensor  # (...) bool: rows with NaN or +inf, or all -inf; their outputs are NaN


def _upcast(logits: Tensor, other: Tensor) -> Tensor:
    return logits.to(torch.float64 if torch.float64 in (logits.dtype, other.dtype) else torch.float32)


def row_values(logits_pre: Tensor, logits_ft: Tensor, alpha: float, direction: str) -> Rows:
    """The specification's symbols for (..., V) rows; rows that are not valid are computed on zeros."""
    a, z = _upcast(logits_pre, logits_ft), _upcast(logits_ft, logits_pre)
    invalid = torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device)
    for logits in (a, z):
        top = logits.amax(-1)  # NaN where a NaN is
        invalid = invalid | ~torch.isfinite(top)
    # Invalid rows are computed on zeros and overwritten at the end, so that no NaN reaches a gradient.
    a, z = (logits.masked_fill(invalid[..., None], 0.0) for logits in (a, z))
    has_both = (a > -math.inf) & (z > -math.inf)
    d = z.masked_fill(~has_both, 0.0) - a.masked_fill(~has_both, 0.0)
    p = torch.softmax(z, -1)
    dbar = (p * d).sum(-1, keepdim=True)
    c = torch.where(has_both, d - dbar, 0.0)
    kl = (dbar.squeeze(-1) - (torch.logsumexp(z, -1) - torch.logsumexp(a, -1))).clamp(min=0.0)
    unbounded = ((a == -math.inf) & (z > -math.inf)).any(-1)
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    kept = z >= z.amax(-1, keepdim=True) + log_alpha
    return Rows(
        z=z,
        p=p,
        delta=p * c if direction == KL else c,
        kept=kept.detach(),
        kl=kl.masked_fill(unbounded, math.inf),
        invalid=invalid,
    )


def _nan_where_invalid(value: Tensor, rows: Rows) -> Tensor:
    return value.masked_fill(
        rows.invalid.reshape(rows.invalid.shape + (1,) * (value.dim() - rows.invalid.dim())), math.nan
    )


def at_label(values: Tensor, labels: Tensor) -> Tensor:
    """values[..., label], with label 0 standing in for labels outside the vocabulary: their results are overwritten."""
    inside = (labels >= 0) & (labels < values.shape[-1])
    return values.gather(-1, torch.where(inside, labels, 0).long()[..., None]).squeeze(-1)


def label_moments(rows: Rows, labels: Tensor) -> Tensor:
    """(..., 3): N = <e_y - p, delta>, D = sum delta^2, H = Var_p(delta), all over K. Zeros where the label is ignored."""
    kept_delta = torch.where(rows.kept, rows.delta, 0.0)
    mean = (rows.p * kept_delta).sum(-1)
    n = at_label(kept_delta, labels) - mean
    d = kept_delta.square().sum(-1)
    h = ((rows.p * kept_delta.square()).sum(-1) - mean.square()).clamp(min=0.0)
    moments = torch.stack((n, d, h), -1)
    outside = (labels < 0) | (labels >= rows.p.shape[-1])
    moments = moments.masked_fill(outside[..., None], math.nan).masked_fill((labels == IGNORE_INDEX)[..., None], 0.0)
    return _nan_where_invalid(moments, rows)


def strength_from_moments(moments: Tensor, labels: Tensor, eps: float) -> Tensor:
    """mu*_gn = N / (D + eps) (Eq. 41 / 43), 0 where the label is ignored, whatever eps is."""
    mu_star = moments[..., 0] / (moments[..., 1] + eps)
    return mu_star.masked_fill((labels == IGNORE_INDEX) & ~moments[..., 0].isnan(), 0.0)


def steered_logits(rows: Rows, mu: Tensor, penalty: float) -> Tensor:
    """Steered logits zs, (..., V), for mu (...) or broadcastable to it."""
    mu = mu[..., None]
    outside = rows.z + mu.abs() * penalty if penalty > -math.inf else -math.inf  # not 0 * -inf = NaN at mu = 0
    return torch.where(rows.kept, rows.z + mu * rows.delta, outside)


def _steered_logprobs(rows: Rows, mu: float | Tensor, penalty: float) -> Tensor:
    mu = torch.as_tensor(mu, dtype=rows.z.dtype).to(rows.z).expand(rows.kl.shape)
    return torch.log_softmax(steered_logits(rows, mu, penalty), -1)


def fused_steer(
    logits_pre: Tensor,
    logits_ft: Tensor,
    mu: float | Tensor | None,
    labels: Tensor | None,
    alpha: float,
    penalty: float,
    direction: str,
    eps: float,
    return_kl: bool,
    out: Tensor | None = None,
    save: bool = True,
) -> tuple[Tensor | None, ...]:
    """(logprobs, mu, num_kept, kl, mu_star, moments, None) as `svdecode.fused_steer` defines them, None for the unasked."""
    rows = row_values(logits_pre, logits_ft, alpha, direction)
    moments = label_moments(rows, labels) if labels is not None else None
    mu_star = strength_from_moments(moments, labels, eps) if moments is not None else None
    if mu is None:
        mu = mu_star if mu_star is not None else 1.0
    mu = torch.as_tensor(mu, dtype=rows.z.dtype).to(rows.z).expand(rows.kl.shape)
    logprobs = _nan_where_invalid(_steered_logprobs(rows, mu, penalty), rows)
    return (
        logprobs if out is None else out.copy_(logprobs),
        _nan_where_invalid(mu, rows),
        rows.kept.sum(-1, dtype=torch.int32).masked_fill(rows.invalid, 0),
        _nan_where_invalid(rows.kl, rows) if return_kl else None,
        mu_star,
        moments,
        None,
    )


def steering_vector(logits_pre: Tensor, logits_ft: Tensor, alpha: float, direction: str) -> tuple[Tensor, None]:
    """(delta on K and 0 elsewhere (..., V), None)."""
    rows = row_values(logits_pre, logits_ft, alpha, direction)
    return _nan_where_invalid(torch.where(rows.kept, rows.delta, 0.0), rows), None


def optimal_strength(
    logits_pre: Tensor, logits_ft: Tensor, labels: Tensor, alpha: float, direction: str, eps: float
) -> tuple[Tensor, Tensor, None]:
    """(mu_star (...), moments (..., 3), None)."""
    moments = label_moments(row_values(logits_pre, logits_ft, alpha, direction), labels)
    return strength_from_moments(moments, labels, eps), moments, None


def steered_nll(
    logits_pre: Tensor,
    logits_ft: Tensor,
    labels: Tensor,
    mu: Tensor,
    alpha: float,
    penalty: float,
    direction: str,
) -> tuple[Tensor, None]:
    """(-log p_mu(label) for each of the (M,) strengths (..., M), None); 0 where the label is ignored."""
    rows = row_values(logits_pre, logits_ft, alpha, direction)
    nll = []
    for strength in mu.to(rows.z).unbind():  # one strength at a time: memory does not grow with M
        steered = steered_logits(rows, strength, penalty)
        nll.append(torch.logsumexp(steered, -1) - at_label(steered, labels))
    result = torch.stack(nll, -1) if nll else rows.z.new_empty((*labels.shape, 0))
    outside = (labels < 0) | (labels >= rows.z.shape[-1])
    result = result.masked_fill(outside[..., None], math.nan)
    result = result.masked_fill((labels == IGNORE_INDEX)[..., None], 0.0)
    return _nan_where_invalid(result, rows), None


def steer_sample(
    logits_pre: Tensor,
    logits_ft: Tensor,
    mu: Tensor,
    uniform: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    alpha: float,
    penalty: float,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """(tokens (...) int64, logprobs (...)): one draw per row by inverting the CDF in the order of token ids at `uniform` (...).

    Truncation as in transformers: temperature, then top_k, then top_p; tokens that tie with the last one are kept.
    """
    rows = row_values(logits_pre, logits_ft, alpha, direction)
    logprobs = _steered_logprobs(rows, mu, penalty)
    ids = torch.arange(logprobs.shape[-1], device=logprobs.device)
    if temperature == 0:
        best = logprobs == logprobs.amax(-1, keepdim=True)
        tokens = torch.where(best, ids, logprobs.shape[-1] - 1).amin(-1)
    else:
        scores = logprobs / temperature
        if top_k is not None and top_k < scores.shape[-1]:
            kth = scores.topk(top_k, -1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, -math.inf)
        weights = torch.softmax(scores.double(), -1)
        if top_p is not None and top_p < 1:
            ordered = weights.sort(-1, descending=True).values
            # A token stays while the mass above it is less than top_p.
            stays = ordered.cumsum(-1) - ordered < top_p
            least = ordered.masked_fill(~stays, math.inf).amin(-1, keepdim=True)
            weights = weights.masked_fill(weights < least, 0.0)
        cdf = weights.cumsum(-1)
        target = uniform.double()[..., None] * cdf[..., -1:]
        last = torch.where(weights > 0, ids, 0).amax(-1)
        tokens = (cdf <= target).sum(-1).minimum(last)
    tokens = tokens.masked_fill(rows.invalid, -1)
    return tokens, _nan_where_invalid(at_label(logprobs, tokens), rows)


def steer_topk(
    logits_pre: Tensor, logits_ft: Tensor, mu: Tensor, k: int, alpha: float, penalty: float, direction: str
) -> tuple[Tensor, Tensor]:
    """(tokens (..., k) int64, logprobs (..., k)), best first, ties by the lower token; -1 where there are fewer than k."""
    rows = row_values(logits_pre, logits_ft, alpha, direction)
    logprobs = _nan_where_invalid(_steered_logprobs(rows, mu, penalty), rows)
    ordered, tokens = logprobs.sort(dim=-1, descending=True, stable=True)
    best, tokens = ordered[..., :k].contiguous(), tokens[..., :k]
    return tokens.masked_fill(~(best > -math.inf), -1), best
