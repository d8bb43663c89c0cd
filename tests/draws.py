"""Draws of steer_sample on a backend beside the reference's, at the same uniform numbers."""

from __future__ import annotations

import torch

import svdecode

OPS = torch.ops.svdecode


def draw(pre, ft, mu, uniform, backend, temperature=1.0, top_k=None, top_p=None, **settings):
    """Tokens and log-probs of a backend and of the reference in float64, at the same uniform numbers."""
    mu = mu if isinstance(mu, torch.Tensor) else torch.scalar_tensor(mu, dtype=torch.float64)
    rest = (temperature, top_k, top_p, *(settings[name] for name in ("alpha", "penalty", "direction")))
    got = OPS.steer_sample(pre, ft, mu, uniform, *rest, backend)
    return got, OPS.steer_sample(pre.double(), ft.double(), mu, uniform, *rest, "reference")


def assert_same_draw(got, expected, pre, ft, mu, uniform, rest):
    """Equal tokens, or one that rounding explains.

    A uniform number within rounding of a boundary would have given it, or tokens that tie in another order: the order decides
    which of them top_k and top_p leave.
    """
    (tokens, logprobs), (true_tokens, _) = got, expected
    differs = tokens != true_tokens
    if differs.any():
        rising = torch.arange(ft.shape[-1], device=ft.device).double() / ft.shape[-1]
        near = []
        for shift, slope in ((-2e-5, 0.0), (2e-5, 0.0), (0.0, -2e-6), (0.0, 2e-6)):
            shifted = (uniform + shift).clamp(0, 1)
            both = (x.double() + slope * rising for x in (pre, ft))  # or log_ratio at mu = -1 would not see it
            _, (other, _) = draw(*both, mu, shifted, "reference", **rest)
            near.append(other)
        assert (tokens == torch.stack(near)).any(0)[differs].all(), (tokens, true_tokens, near)
    settings = {name: rest[name] for name in ("alpha", "penalty", "direction")}
    steered = svdecode.fused_steer(pre.double(), ft.double(), mu, **settings).logprobs
    chosen = steered.gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-6, atol=1e-5, equal_nan=True)
