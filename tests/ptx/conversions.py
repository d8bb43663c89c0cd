"""cvt: between integers, float32, float64, float16 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.dtypes import F16, F32, F64, NUMPY, U32, Fault, bf16_to_f32, f32_to_bf16
from ptx.operands import Operands, Run
from ptx.program import Instruction

FLOAT = ("f16", "bf16", "f32", "f64")
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ALLOWED = {"rn", "rna", "rz", "ftz", "sat", *TO_INTEGER}


def build(i: Instruction, operands: Operands) -> Run:
    """What runs a conversion. Floats out of an integer's range give its nearest value, and NaN gives 0."""
    rounding = [word for word in i.modifiers if word not in NUMPY]
    target, source = (word for word in i.modifiers if word in NUMPY)
    if not set(rounding) <= ALLOWED or ("rz" in rounding and target != "bf16"):
        raise Fault("a rounding that the interpreter does not have")
    if target in ("bf16x2", "f16x2"):
        return _pack(i, operands, target)
    read = operands.read(i.operands[1], source)
    write = operands.write_widened(i.operands[0], "b16" if target == "bf16" else target)
    convert = _conversion(target, source, rounding)
    return lambda t, m: write(t, convert(read(t)), m)


def _conversion(target: str, source: str, rounding: list[str]) -> Callable:
    dtype = NUMPY[target]
    widen = bf16_to_f32 if source == "bf16" else (lambda x: x)
    if source in FLOAT and target not in FLOAT:
        to_whole = TO_INTEGER[next(word for word in rounding if word in TO_INTEGER)]
        return lambda x: _to_integer(to_whole(widen(x).astype(F64)), dtype)
    if source in FLOAT and any(word in TO_INTEGER for word in rounding):
        to_whole = TO_INTEGER[next(word for word in rounding if word in TO_INTEGER)]
        return lambda x: to_whole(widen(x)).astype(dtype)
    if target == "bf16":
        return lambda x: f32_to_bf16(_to_f32(widen(x)), "rz" in rounding)
    if "sat" in rounding:
        if target in FLOAT:
            return lambda x: np.where(np.isnan(x), 0.0, np.clip(widen(x), 0.0, 1.0)).astype(dtype)
        limits = np.iinfo(dtype)
        return lambda x: np.clip(x, limits.min, limits.max).astype(dtype)
    return lambda x: widen(x).astype(dtype)


def _to_f32(x: np.ndarray) -> np.ndarray:
    if x.dtype not in (F32, F16):
        raise Fault("bfloat16 from this type is not in the interpreter")
    return x.astype(F32)


def _to_integer(whole: np.ndarray, dtype: np.dtype) -> np.ndarray:
    limits = np.iinfo(dtype)
    above, below = whole >= float(limits.max), whole <= float(limits.min)
    inside = np.where(above | below | np.isnan(whole), 0.0, whole).astype(dtype)
    result = np.where(above, dtype.type(limits.max), np.where(below, dtype.type(limits.min), inside))
    return np.where(np.isnan(whole), dtype.type(0), result)


def _pack(i: Instruction, operands: Operands, target: str) -> Run:
    """cvt.rn.bf16x2.f32 d, a, b: a in the upper half."""
    write = operands.write(i.operands[0])
    high, low = (operands.read(text, "f32") for text in i.operands[1:3])

    def half(x: np.ndarray) -> np.ndarray:
        return f32_to_bf16(x) if target == "bf16x2" else x.astype(F16).view(np.uint16)

    def run(t, m) -> None:
        upper, lower = half(high(t)).astype(U32), half(low(t)).astype(U32)
        write(t, upper << U32.type(16) | lower, m)

    return run
