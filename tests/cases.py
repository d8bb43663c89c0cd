"""The shared table of cases: every backend's operators run through it against the float64 reference."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from rows import kept_labels, model_rows
from torch import Tensor

import svdecode
from svdecode.ops import compiled

INSTRUCTION_SETS = ["base", "avx2", "avx512"]  # each needs what the one before it needs


def tested_backends() -> list[str]:
    """What is tested against the reference: on the GPU where there is one, else the CPU operators with each instruction set."""
    names = [name for name, found in svdecode.backends().items() if found and name not in ("reference", "cpu")]
    if svdecode.backends()["cpu"] and not torch.cuda.is_available():
        best = INSTRUCTION_SETS.index(compiled.instruction_set())
        names += [f"cpu-{name}" for name in INSTRUCTION_SETS[: best + 1]]
    return names


BACKENDS = tested_backends()


@contextlib.contextmanager
def use_backend(tested: str):
    """Choose one of BACKENDS for all operators, and give the name that `backend=` takes. "cpu-avx2" is "cpu" with AVX2."""
    name, _, instruction_set = tested.partition("-")
    before = instruction_set and compiled.instruction_set()
    if instruction_set:
        compiled.instruction_set(instruction_set)
    try:
        with svdecode.use_backend(name):
            yield name
    finally:
        if instruction_set:
            compiled.instruction_set(before)


class Case(NamedTuple):
    """Shape and settings of one call; `why` says which boundary it crosses."""

    why: str
    shape: tuple[int, ...]
    alpha: float = 0.1
    penalty: float = -math.inf
    direction: str = "kl"
    pre: torch.dtype = torch.float32
    ft: torch.dtype = torch.float32
    spread: float = 3.0

    @property
    def settings(self) -> dict[str, object]:
        return {"alpha": self.alpha, "penalty": self.penalty, "direction": self.direction}

    def logits(self, device: torch.device) -> tuple[Tensor, Tensor]:
        pre, ft = model_rows(*self.shape, spread=self.spread)
        return pre.to(device, self.pre), ft.to(device, self.ft)

    def labels(self, ft: Tensor) -> Tensor:
        return kept_labels(ft).to(ft.device)


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Case("one token: K is the row", (2, 1)),
    Case("a vocabulary below one tile", (3, 13)),
    Case("a full tile and nothing else", (2, 1024)),
    Case("one token in a second tile: the tail", (2, 1025)),
    Case("a full split", (2, 4096)),
    Case("one token in a second split: two programs per row", (3, 4097)),
    Case("three splits: a padded vector of partials", (2, 9001), penalty=-1.0),
    Case("GPT-2's odd vocabulary: unaligned rows", (2, 50257), direction="log_ratio"),
    Case("everything kept", (3, 5000), alpha=0.0),
    Case("everything kept, peers' direction", (3, 5000), alpha=0.0, direction="log_ratio"),
    Case("the arg max alone", (3, 5000), alpha=1.0),
    Case("flat rows: nearly all kept, many kept tiles", (2, 9001), spread=0.3),
    Case("no penalty: outside tokens keep their logits", (3, 5000), penalty=0.0),
    Case("finite penalty, peers' direction", (3, 5000), penalty=-2.0, direction="log_ratio"),
    Case("leading dimensions", (2, 3, 700)),
    Case("no leading dimension", (700,)),
    Case("no rows", (0, 700)),
    Case("half precision", (3, 5000), pre=FP16, ft=FP16),
    Case("bfloat16", (3, 5000), pre=BF16, ft=BF16),
    Case("mixed precision", (3, 5000), pre=BF16, ft=torch.float32, penalty=-1.0),
    Case("mixed precision the other way", (3, 5000), pre=torch.float32, ft=FP16),
]
STRENGTHS = ("number", "rows", "own")


def case_id(case: Case) -> str:
    return case.why.replace(" ", "-").replace(":", "").replace(",", "").replace("'", "")


def strength(kind: str, case: Case, device: torch.device) -> float | Tensor | None:
    """mu as a number, as a tensor with one per row, or left out (each row's own mu_star)."""
    if kind == "own":
        return None
    return (
        0.8
        if kind == "number"
        else torch.linspace(-1.0, 2.0, math.prod(case.shape[:-1]), device=device).reshape(case.shape[:-1])
    )


def assert_scalars_close(got: Tensor, expected: Tensor, what: str = "") -> None:
    """1e-4 relative, and an absolute floor of float32 rounding, NaN equal to NaN. An output of zeros fails."""
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=1e-4, atol=1e-9, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def assert_logprobs_close(got: Tensor, expected: Tensor) -> None:
    """1e-5 absolute where finite (plus float32's rounding of large values), infinities and NaN in the same places."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=3e-7, atol=1e-5, equal_nan=True)
