"""Random calls of every operator on every backend that is here, against the float64 reference, for as long as you like.

    make fuzz [SECONDS=600]
    python tests/fuzz_operators.py --replay '{"operator": "steered_nll", ...}'

Hypothesis draws the calls, and makes a failing one as small as it can. It is printed as one line, which `--replay` takes.
`test_properties.py` is the part of this that `make test` runs.
"""

from __future__ import annotations

import conftest  # isort: skip  # which backends there are is decided before svdecode is imported

import argparse
import dataclasses
import json
import math
import secrets
import sys
import time
import warnings
from collections import Counter

import hypothesis
import torch
from cases import BACKENDS, assert_logprobs_close, use_backend
from draws import assert_same_draw, draw
from hypothesis import strategies as st
from rows import kept_labels, model_rows
from test_backward import assert_gradients_close, gradients
from torch import Tensor

import svdecode

assert conftest
EXAMPLES = {"cpu": 40, "cuda": 20, "triton": 6}
"""Calls of one operator on one backend before it is the next one's turn; without a GPU, Triton runs in its interpreter."""
LARGEST = {"cpu": 9000, "cuda": 2300, "triton": 1100}
"""Vocabularies."""
warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of the planted values, in Triton's interpreter


@dataclasses.dataclass(frozen=True)
class Call:
    """One call; `seed` stands for its random values. Fields that an operator does not have are not used."""

    operator: str
    backend: str
    shape: list[int]
    pre: str = "float32"
    ft: str = "float32"
    layout: str = "contiguous"
    default_dtype: str = "float32"
    alpha: float = 0.1
    penalty: float = -math.inf
    direction: str = "kl"
    mu: float | None = 0.7  # None: one per row
    spread: float = 1.0
    levels: int | None = None  # so many different logits per nat: ties
    planted: list[tuple[bool, int, float]] = dataclasses.field(default_factory=list)  # (in ft?, position, value)
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    k: int = 1
    seed: int = 0

    @property
    def settings(self) -> dict[str, object]:
        return {"alpha": self.alpha, "penalty": self.penalty, "direction": self.direction}

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
        """(logits_pre, logits_ft, labels, mu)."""
        torch.manual_seed(self.seed)
        pair = model_rows(*self.shape, spread=self.spread)
        pair = pair if self.levels is None else tuple((x * self.levels).round() / self.levels for x in pair)
        for in_ft, position, value in self.planted:
            pair[in_ft].view(-1)[position % pair[0].numel()] = value
        labels = kept_labels(pair[1].nan_to_num())
        mu = self.mu if self.mu is not None else torch.linspace(-1.0, 2.0, labels.numel()).reshape(labels.shape)
        pre, ft = (x.to(getattr(torch, name)) for x, name in zip(pair, (self.pre, self.ft), strict=True))
        return laid_out(pre, self.layout), laid_out(ft, self.layout), labels, mu


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; "padded" rows are not aligned."""
    if layout == "padded":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "transposed":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "every other row":
        return x.repeat_interleave(2, 0)[::2]
    return x.repeat_interleave(2, -1)[..., ::2] if layout == "last dimension strided" else x


def close(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """1e-4 relative, and as much of `scale` where terms of that size cancel; infinities and NaN in the same places."""
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)


def largest(x: Tensor) -> float:
    """The largest finite magnitude, at least 1e-3."""
    return max(x.nan_to_num(posinf=0.0, neginf=0.0).abs().amax().item(), 1e-3)


def check_fused_steer(call: Call, pre, ft, labels, mu) -> None:
    got = svdecode.fused_steer(pre, ft, mu, labels=labels, **call.settings)
    truth = svdecode.fused_steer(pre.double(), ft.double(), mu, labels=labels, **call.settings)
    assert_logprobs_close(got.logprobs, truth.logprobs)
    assert got.num_kept.tolist() == truth.num_kept.tolist()
    close(got.kl, truth.kl)
    check_moments(call, pre, ft, (got.mu_star, got.moments), truth.moments)
    weights = torch.randn(ft.shape, dtype=torch.float64)

    def loss(pre, ft):
        logprobs = svdecode.fused_steer(pre, ft, mu, **call.settings).logprobs
        return (logprobs.masked_fill(~logprobs.isfinite(), 0.0) * weights.to(logprobs)).sum()

    assert_gradients_close(gradients(loss, pre, ft), gradients(loss, pre.double(), ft.double()))


def check_moments(call: Call, pre, ft, got, truth: Tensor) -> None:
    mu_star, moments = got
    delta = svdecode.steering_vector(pre.double(), ft.double(), alpha=call.alpha, direction=call.direction)
    scale = largest(delta)
    for column, size in enumerate((scale, scale**2, scale**2)):
        close(moments[..., column], truth[..., column], size)
    close(mu_star, moments[..., 0].double() / (moments[..., 1].double() + svdecode.constants.EPS))


def check_optimal_strength(call: Call, pre, ft, labels, _mu) -> None:
    settings = {"alpha": call.alpha, "direction": call.direction}
    truth = svdecode.optimal_strength(pre.double(), ft.double(), labels, **settings)[1]
    check_moments(call, pre, ft, svdecode.optimal_strength(pre, ft, labels, **settings), truth)


def check_steering_vector(call: Call, pre, ft, _labels, _mu) -> None:
    settings = {"alpha": call.alpha, "direction": call.direction}
    truth = svdecode.steering_vector(pre.double(), ft.double(), **settings)
    close(svdecode.steering_vector(pre, ft, **settings), truth, largest(truth))


def check_steered_nll(call: Call, pre, ft, labels, mu) -> None:
    strengths = torch.tensor([0.0, -0.5, 0.8], dtype=torch.float32)

    def nll(pre, ft):
        return svdecode.steered_nll(pre, ft, labels, strengths, **call.settings)

    close(nll(pre, ft), nll(pre.double(), ft.double()))

    def loss(pre, ft):
        return nll(pre, ft).nan_to_num(posinf=0.0).sum()

    assert_gradients_close(gradients(loss, pre, ft), gradients(loss, pre.double(), ft.double()))


def check_steer_sample(call: Call, pre, ft, labels, mu) -> None:
    uniform = None if call.temperature == 0 else torch.rand(ft.shape[:-1], dtype=torch.float32)
    rest = dict(temperature=call.temperature, top_k=call.top_k, top_p=call.top_p, **call.settings)
    backend = call.backend.partition("-")[0]
    drawn = draw(pre, ft, mu, uniform, backend, **rest)
    if uniform is not None:
        assert_same_draw(*drawn, pre, ft, mu, uniform, rest)
    steered = svdecode.fused_steer(pre.double(), ft.double(), mu, **call.settings).logprobs
    tokens, logprobs = drawn[0]
    valid = ~steered.isnan().any(-1)
    assert ((tokens >= 0) == valid).all()
    assert_logprobs_close(logprobs, steered.gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1))
    if uniform is None:
        assert_logprobs_close(logprobs[valid], steered.amax(-1)[valid])


def check_steer_topk(call: Call, pre, ft, labels, mu) -> None:
    k = min(call.k, ft.shape[-1])
    tokens, logprobs = svdecode.steer_topk(pre, ft, mu, k=k, **call.settings)
    truth = svdecode.steer_topk(pre.double(), ft.double(), mu, k=k, **call.settings)[1]
    assert_logprobs_close(logprobs, truth)
    steered = svdecode.fused_steer(pre.double(), ft.double(), mu, **call.settings).logprobs
    found = tokens >= 0
    assert (found == (truth > -math.inf)).all()
    assert_logprobs_close(logprobs[found], steered.gather(-1, tokens.clamp(min=0))[found])
    for row in tokens.flatten(0, -2):
        assert len(row[row >= 0].unique()) == (row >= 0).sum()


CHECKS = {
    "fused_steer": check_fused_steer,
    "optimal_strength": check_optimal_strength,
    "steering_vector": check_steering_vector,
    "steered_nll": check_steered_nll,
    "steer_sample": check_steer_sample,
    "steer_topk": check_steer_topk,
}


def on_the_edge_of_k(call: Call, ft: Tensor) -> bool:
    """Whether a token is so near to the threshold that float32 and float64 may disagree on K."""
    z = ft.double()
    away = (z - z.amax(-1, keepdim=True) - math.log(max(call.alpha, 1e-300))).abs()
    return call.alpha < 1 and bool((away < 1e-5 * z.abs().clamp(min=1.0)).any())


def run(call: Call) -> None:
    """Make the call and compare it; AssertionError where it is wrong."""
    pre, ft, labels, mu = call.inputs()
    if on_the_edge_of_k(call, ft):
        return
    try:
        torch.set_default_dtype(getattr(torch, call.default_dtype))
        with use_backend(call.backend):
            CHECKS[call.operator](call, pre, ft, labels, mu)
    finally:
        torch.set_default_dtype(torch.float32)


def calls(operator: str, backend: str) -> st.SearchStrategy[Call]:
    """Calls of one operator on one backend."""
    dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
    return st.builds(
        Call,
        operator=st.just(operator),
        backend=st.just(backend),
        shape=st.tuples(
            st.lists(st.integers(1, 3), min_size=1, max_size=2),
            st.one_of(st.integers(1, 70), st.integers(1, LARGEST[backend.partition("-")[0]])),
        ).map(lambda parts: [*parts[0], parts[1]]),
        pre=dtypes,
        ft=dtypes,
        layout=st.sampled_from(["contiguous", "padded", "transposed", "every other row", "last dimension strided"]),
        default_dtype=st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
        alpha=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
        penalty=st.sampled_from([-math.inf, -7.5, -1.0, 0.0]),
        direction=st.sampled_from(["kl", "log_ratio"]),
        mu=st.sampled_from([0.7, 0.0, -1.5, None]),
        spread=st.sampled_from([0.1, 1.0, 4.0]),
        levels=st.sampled_from([None, None, 1, 4]),
        planted=st.lists(
            st.tuples(st.booleans(), st.integers(0, 30000), st.sampled_from([-math.inf] * 3 + [math.nan, math.inf])),
            max_size=5,
        ),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        top_k=st.sampled_from([None, 1, 5, 10**6]),
        top_p=st.sampled_from([None, 0.2, 0.95]),
        k=st.integers(1, 60),
        seed=st.integers(0, 10**6),
    )


def fuzz(operator: str, backend: str, seed: int) -> bool:
    """Some calls of one operator on one backend; whether all were right. The smallest that was wrong is printed."""
    failed: list[Call] = []
    options = hypothesis.settings(
        max_examples=EXAMPLES[backend.partition("-")[0]], deadline=None, database=None, derandomize=False,
        report_multiple_bugs=False, suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip

    @hypothesis.seed(seed)
    @options
    @hypothesis.given(calls(operator, backend))
    def try_it(call: Call) -> None:
        try:
            run(call)
        except Exception:
            failed.append(call)  # the last one that hypothesis tries is the smallest
            raise

    try:
        try_it()
    except Exception as error:
        print(f"\n{type(error).__name__}: {error}\nreplay: --replay '{json.dumps(dataclasses.asdict(failed[-1]))}'")
        return False
    return True


def main() -> int:
    """Run until the time is over, over all operators and backends in turns; 1 where a call failed."""
    parser = argparse.ArgumentParser(description="Random calls of every operator against the float64 reference.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default: 600)")
    parser.add_argument("--replay", help="a failing call, as it was printed")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        run(Call(**json.loads(arguments.replay)))
        print("this call is right")
        return 0
    end, counts, failures = time.monotonic() + arguments.seconds, Counter(), set()
    pairs = [(operator, backend) for backend in sorted(BACKENDS) for operator in CHECKS]  # "cpu" first, the quick one
    while time.monotonic() < end and len(failures) < len(pairs):
        for pair in pairs:
            if pair not in failures and time.monotonic() < end:  # one failure of a pair is enough
                counts[pair] += EXAMPLES[pair[1].partition("-")[0]]
                if not fuzz(*pair, seed=secrets.randbits(32)):
                    failures.add(pair)
    for (operator, backend), count in counts.items():
        print(f"{operator:20} {backend:12} {count:7} calls  {'FAILED' if (operator, backend) in failures else 'right'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
