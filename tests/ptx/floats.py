"""Floating-point arithmetic: f32, f64, f16, bf16 and the packed f32x2."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.approximations import Perturbation
from ptx.dtypes import F16, F32, F64, NUMPY, PACKED, U64, Fault, bf16_to_f32, f32_to_bf16, halves, packed
from ptx.operands import Operands, Run
from ptx.program import Instruction

SMALLEST_NORMAL = np.float32(2.0**-126)
NAN = np.uint32(0x7FFFFFFF).view(F32)
_BELOW = np.uint64((1 << 29) - 1)  # the bits of a float64 that a float32 lacks
_HALF_WAY = np.uint64(1 << 28)


def flushed(x: np.ndarray) -> np.ndarray:
    """Denormals to zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def canonical(x: np.ndarray) -> np.ndarray:
    """Every NaN that a GPU computes in float32 has the same bits; a CPU's have a sign, and keep an operand's bits."""
    wrong = x != x
    return np.where(wrong, NAN, x) if wrong.any() else x


def fma32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in float32, rounded once. The product is exact in float64; the sum is not, and is mended where that shows."""
    product, addend = x.astype(F64) * y.astype(F64), z.astype(F64)
    total = product + addend
    result = total.astype(F32)
    doubtful = (total.view(U64) & _BELOW) == _HALF_WAY
    doubtful |= np.abs(total) < SMALLEST_NORMAL
    if not doubtful.any():
        return result
    at = np.nonzero(doubtful & np.isfinite(total))
    p, a, t = (np.broadcast_to(v, total.shape)[at] for v in (product, addend, total))
    virtual = t - p
    error = (p - (t - virtual)) + (a - virtual)
    odd = (t.view(U64) & np.uint64(1)) == 1
    towards = np.where(error > 0, np.inf, -np.inf)
    result[at] = np.where((error != 0) & ~odd, np.nextafter(t, towards), t).astype(F32)
    return result


def fma64(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in float64 from the extended type of the host, whose 64 bits hide all but rare double roundings."""
    return (x.astype(np.longdouble) * y.astype(np.longdouble) + z.astype(np.longdouble)).astype(F64)


def _propagating(pick: Callable) -> Callable:
    """min.NaN and max.NaN give the canonical NaN where an operand is NaN."""
    return lambda x, y: np.where(np.isnan(x) | np.isnan(y), NAN, pick(x, y))


def _signed_zeros(pick: Callable, minimum: bool) -> Callable:
    """-0 is below +0 for min and max, which numpy does not promise."""

    def run(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = pick(x, y)
        zeros = result == 0
        if zeros.any():
            zeros &= (x == 0) & (y == 0)
            negative = np.signbit(x) | np.signbit(y) if minimum else np.signbit(x) & np.signbit(y)
            result = np.where(zeros, np.where(negative, -result.dtype.type(0), result.dtype.type(0)), result)
        return result

    return run


BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": _signed_zeros(np.fmin, True),
    "max": _signed_zeros(np.fmax, False),
}
UNARY = {"neg": np.negative, "abs": np.abs}
APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


def build(i: Instruction, operands: Operands, perturb: Perturbation) -> Run:
    """What runs an instruction whose type is a floating-point one."""
    types = [word for word in i.modifiers if word in NUMPY]
    kind = types[0]
    if any(word in ("rz", "rm", "rp", "sat") for word in i.modifiers):
        raise Fault("a rounding or saturation that the interpreter does not have")
    write = operands.write(i.operands[0])
    last = len(i.operands) - 1  # sub.rn.f32.bf16: all operands but the last are of the second type
    readers = [_reader(i, operands, kind if n == last else types[-1]) for n in range(1, last + 1)]
    values = [read(text) for read, text in zip(readers, i.operands[1:], strict=True)]
    finish = _finish(i, kind)
    if i.name in BINARY:
        combine = BINARY[i.name]
        if i.name in ("min", "max") and "NaN" in i.modifiers:
            combine = _propagating(combine)
        if len(values) == 3:  # min and max of three, sm_100
            a, b, c = values
            return lambda t, m: write(t, finish(combine(combine(a(t), b(t)), c(t))), m)
        a, b = values
        return lambda t, m: write(t, finish(combine(a(t), b(t))), m)
    if i.name in UNARY:
        apply, a = UNARY[i.name], values[0]
        return lambda t, m: write(t, finish(apply(a(t))), m)
    if i.name in ("fma", "mad"):
        a, b, c = values
        fused = _fma(kind)
        return lambda t, m: write(t, finish(fused(a(t), b(t), c(t))), m)
    if i.name == "copysign":
        a, b = values
        return lambda t, m: write(t, finish(np.copysign(b(t), a(t))), m)
    if i.name == "div" and kind in ("f32", "f64"):
        return _divide(i, write, values, finish, perturb)
    if i.name in APPROXIMATE and kind in ("f32", "f64"):
        return _approximate(i, write, values[0], finish, perturb)
    raise Fault("an instruction that the interpreter does not have")


def _reader(i: Instruction, operands: Operands, kind: str) -> Callable:
    """Reads an operand: bf16 as float32, f32x2 as pairs, denormals flushed where the instruction says so."""

    def read(text: str) -> Callable:
        if text.startswith("-%"):
            positive = read(text[1:])
            return lambda t: -positive(t)
        get = operands.read(text, kind)
        if kind == "bf16":
            return lambda t: bf16_to_f32(get(t))
        if kind == "f32x2":
            return lambda t: np.ascontiguousarray(get(t)).view(F32).reshape(-1, 2)
        if "ftz" in i.modifiers and kind == "f32":
            return lambda t: flushed(get(t))
        if kind == "f16" and "f32" in i.modifiers:
            return lambda t: get(t).astype(F32)
        if kind in PACKED:
            return lambda t: halves(get(t), kind)
        return get

    return read


def _finish(i: Instruction, kind: str) -> Callable:
    """From what was computed to what the register holds."""
    if kind == "bf16":
        return f32_to_bf16
    if kind in PACKED:
        return lambda x: packed(x, kind)
    if kind == "f32x2":
        return lambda x: np.ascontiguousarray(canonical(x)).view(U64)[:, 0]
    if kind != "f32":
        return lambda x: x
    return (lambda x: flushed(canonical(x))) if "ftz" in i.modifiers else canonical


def _fma(kind: str) -> Callable:
    if kind in ("f32", "f32x2"):
        return fma32
    if kind == "f64":
        return fma64
    if kind == "f16":
        return lambda x, y, z: (x.astype(F64) * y.astype(F64) + z.astype(F64)).astype(F16)
    raise Fault("fma of this type is not in the interpreter")


def _divide(i: Instruction, write: Callable, values: list, finish: Callable, perturb: Perturbation) -> Run:
    a, b = values
    if "f64" in i.modifiers:
        return lambda t, m: write(t, a(t) / b(t), m)
    exact = not ({"full", "approx"} & set(i.modifiers))

    def run(t, m) -> None:
        x, y = a(t), b(t)
        quotient = x.astype(F64) / y.astype(F64)
        write(t, finish(quotient.astype(F32) if exact else perturb("div", quotient, *np.broadcast_arrays(x, y))), m)

    return run


def _approximate(i: Instruction, write: Callable, value: Callable, finish: Callable, perturb: Perturbation) -> Run:
    function = APPROXIMATE[i.name]
    if "f64" in i.modifiers:
        return lambda t, m: write(t, function(value(t)), m)
    exact = "approx" not in i.modifiers

    def run(t, m) -> None:
        x = value(t)
        result = function(x.astype(F64))
        write(t, finish(result.astype(F32) if exact else perturb(i.name, result, x)), m)

    return run
