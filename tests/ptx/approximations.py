"""The error that the PTX manual allows the approximate instructions, added on request.

PTX ISA, "Floating Point Instructions", the largest errors for float32: ex2.approx 2^-22, rcp.approx 2^-23, sqrt.approx 2^-23,
rsqrt.approx 2^-22.9, tanh.approx 2^-11, all relative; div.approx and div.full 2 ulp; lg2.approx 2^-22, absolute between 0.5
and 2 and relative elsewhere; sin.approx and cos.approx 2^-20.5 absolute.

The error is a function of the operands, as it is on the chip: the same operands give the same result in any thread. Where the
exact result needs few bits, such as 2^3 or 1/4, the chip is exact and so are we.
"""

from __future__ import annotations

import numpy as np

from ptx.dtypes import F32, F64, U32

RELATIVE = {
    "ex2": 2.0**-22,
    "rcp": 2.0**-23,
    "sqrt": 2.0**-23,
    "rsqrt": 2.0**-22.9,
    "tanh": 2.0**-11,
    "div": 2.0**-22,  # 2 ulp are 2^-22 where the mantissa is 1, and less elsewhere
    "lg2": 2.0**-22,
}
ABSOLUTE = {"lg2": 2.0**-22, "sin": 2.0**-20.5, "cos": 2.0**-20.5}


class Perturbation:
    """Adds an error of up to `size` times what the manual allows; 0 adds none."""

    def __init__(self, size: float = 0.0, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    def __call__(self, name: str, exact: np.ndarray, *operands: np.ndarray) -> np.ndarray:
        """exact: the result in float64. Gives float32."""
        rounded = exact.astype(F32)
        if not self.size:
            return rounded
        error = self.size * self._noise(*operands)
        relative = RELATIVE.get(name, 0.0) * np.abs(exact)
        allowed = relative
        if name == "lg2":
            allowed = np.where(np.abs(exact) < 1.0, ABSOLUTE["lg2"], relative)
        elif name in ABSOLUTE:
            allowed = np.full_like(exact, ABSOLUTE[name])
        few_bits = (rounded == exact) & ((rounded.view(U32) & U32.type(0xFFFF)) == 0)
        wrong = (exact + np.where(np.isfinite(exact), allowed * error, 0.0)).astype(F32)
        return np.where(few_bits | ~np.isfinite(exact), rounded, wrong)

    def _noise(self, *operands: np.ndarray) -> np.ndarray:
        """Between -1 and 1, from a hash of the operands' bits and the seed."""
        with np.errstate(over="ignore"):
            bits = np.uint32(self.seed * 2654435761 & 0xFFFFFFFF)
            for operand in operands:
                bits = (bits ^ np.ascontiguousarray(operand, F32).view(U32)) * U32.type(0x85EBCA6B)
                bits = (bits ^ (bits >> U32.type(15))) * U32.type(0xC2B2AE35)
                bits = bits ^ (bits >> U32.type(13))
        return bits.astype(F64) / 2.0**31 - 1.0
