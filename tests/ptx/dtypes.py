"""The types of PTX as numpy holds them. bfloat16 is held as its 16 bits."""

from __future__ import annotations

import numpy as np

WARP = 32
NUMPY = {
    name: np.dtype(held)
    for name, held in {
        "pred": "?",
        **{f"b{8 * n}": f"u{n}" for n in (1, 2, 4, 8)},
        **{f"u{8 * n}": f"u{n}" for n in (1, 2, 4, 8)},
        **{f"s{8 * n}": f"i{n}" for n in (1, 2, 4, 8)},
        **{"f16": "f2", "bf16": "u2", "f32": "f4", "f64": "f8", "f16x2": "u4", "bf16x2": "u4", "f32x2": "u8"},
    }.items()
}
PACKED = ("f16x2", "bf16x2")
FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2")
U8, U16, U32, U64 = (np.dtype(f"u{n}") for n in (1, 2, 4, 8))
S32, S64, F16, F32, F64 = (np.dtype(name) for name in ("i4", "i8", "f2", "f4", "f8"))


class Fault(RuntimeError):
    """What a GPU would do wrong, or refuse. The message names the kernel, the instruction and what is wrong."""


def unsigned(size: int) -> np.dtype:
    """The unsigned integer of so many bytes."""
    return {1: U8, 2: U16, 4: U32, 8: U64}[size]


def type_of(modifiers: tuple[str, ...]) -> str | None:
    """The last type among an instruction's modifiers: `cvt.rn.bf16.f32` gives f32."""
    return next((word for word in reversed(modifiers) if word in NUMPY), None)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(U32) << np.uint32(16)).view(F32)


def halves(words: np.ndarray, kind: str) -> np.ndarray:
    """The two numbers of a packed register as (n, 2), the lower half first; bfloat16 as float32."""
    parts = np.ascontiguousarray(words).view(F16 if kind == "f16x2" else U16).reshape(-1, 2)
    return parts if kind == "f16x2" else bf16_to_f32(parts)


def packed(numbers: np.ndarray, kind: str) -> np.ndarray:
    """The registers of (n, 2) numbers."""
    parts = np.ascontiguousarray(numbers, F16) if kind == "f16x2" else f32_to_bf16(numbers)
    return np.ascontiguousarray(parts).view(U32)[:, 0]


def f32_to_bf16(x: np.ndarray, to_zero: bool = False) -> np.ndarray:
    """The 16 bits of the nearest bfloat16, ties to even; NaN becomes the one NaN that the hardware gives."""
    bits = np.ascontiguousarray(x, F32).view(U32)
    rounding = np.uint32(0) if to_zero else np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + rounding) >> np.uint32(16)).astype(U16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)
