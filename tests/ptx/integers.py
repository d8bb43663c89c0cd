"""Integer arithmetic, bits, comparisons and selection, and moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.dtypes import FLOATS, NUMPY, PACKED, S64, U8, U32, U64, Fault, bf16_to_f32, halves, type_of, unsigned
from ptx.operands import Operands, Run
from ptx.program import Instruction

BINARY = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum,
}  # fmt: skip
UNARY = {"not": np.invert, "neg": np.negative, "abs": np.abs}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def build(i: Instruction, operands: Operands) -> Run:
    """What runs an integer instruction."""
    kind = type_of(i.modifiers)
    if i.name in ("setp", "set"):
        return _compare(i, operands, kind)
    if i.name == "mov":
        return _move(i, operands, kind)
    if i.name == "cvta":
        return _move(i, operands, kind)
    write = operands.write(i.operands[0])
    if i.name == "selp":
        a, b, chosen = (operands.read(text, k) for text, k in zip(i.operands[1:], (kind, kind, "pred"), strict=True))
        return lambda t, m: write(t, np.where(chosen(t), a(t), b(t)), m)
    if i.name in ("mul", "mad"):
        return _multiply(i, operands, kind)
    special = SPECIAL.get(i.name)
    if special is not None:
        kinds = _kinds(i.name, kind)
        values = [operands.read(text, k) for text, k in zip(i.operands[1:], kinds, strict=False)]
        dtype = NUMPY[kind]
        return lambda t, m: write(t, special(i, dtype, *(value(t) for value in values)), m)
    values = [operands.read(text, kind) for text in i.operands[1:]]
    if i.name in BINARY and len(values) == 2:
        combine, (a, b) = BINARY[i.name], values
        return lambda t, m: write(t, combine(a(t), b(t)), m)
    if i.name in UNARY and len(values) == 1:
        apply, a = UNARY[i.name], values[0]
        return lambda t, m: write(t, apply(a(t)), m)
    raise Fault("an instruction that the interpreter does not have")


def _multiply(i: Instruction, operands: Operands, kind: str) -> Run:
    write = operands.write(i.operands[0])
    a, b = (operands.read(text, kind) for text in i.operands[1:3])
    mode = next(word for word in i.modifiers if word in ("lo", "hi", "wide"))
    result = WIDE[kind] if mode == "wide" else kind
    c = operands.read(i.operands[3], result) if i.name == "mad" else None
    dtype = NUMPY[result]
    bits = np.uint64(8 * NUMPY[kind].itemsize)
    if mode == "hi" and NUMPY[kind].itemsize == 8:
        raise Fault("the upper half of a 64-bit product is not in the interpreter")
    wider = S64 if dtype.kind == "i" else U64

    def run(t, m) -> None:
        x, y = a(t), b(t)
        if mode == "lo":
            product = x * y
        elif mode == "wide":
            product = x.astype(dtype) * y.astype(dtype)
        else:
            product = ((x.astype(wider) * y.astype(wider)) >> wider.type(bits)).astype(dtype)
        write(t, product if c is None else product + c(t), m)

    return run


def _divide(i: Instruction, dtype: np.dtype, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Towards zero. Division by zero has no defined result; here it is all ones."""
    safe = np.where(y == 0, dtype.type(1), y)
    if dtype.kind == "u":
        quotient = x // safe
    else:
        floor = x // safe
        quotient = floor + ((floor < 0) & (floor * safe != x)).astype(dtype)
    quotient = np.where(y == 0, np.invert(dtype.type(0)), quotient)
    return quotient if i.name == "div" else x - quotient * safe


def _shift(i: Instruction, dtype: np.dtype, x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """By the width or more: all bits are shifted out, and the sign stays for shr.s."""
    bits = 8 * dtype.itemsize
    if i.name == "shl":
        return np.where(n >= bits, dtype.type(0), np.left_shift(x, np.minimum(n, bits - 1).astype(dtype)))
    shifted = np.right_shift(x, np.minimum(n, bits - 1).astype(dtype))
    return shifted if dtype.kind == "i" else np.where(n >= bits, dtype.type(0), shifted)


def _funnel_shift(i: Instruction, dtype: np.dtype, low: np.ndarray, high: np.ndarray, n: np.ndarray) -> np.ndarray:
    n = (n & U32.type(31) if "wrap" in i.modifiers else np.minimum(n, U32.type(32))).astype(U64)
    both = high.astype(U64) << U64.type(32) | low.astype(U64)
    return ((both << n) >> U64.type(32) if i.modifiers[0] == "l" else both >> n).astype(U32).view(dtype)


def _permute(i: Instruction, dtype: np.dtype, low: np.ndarray, high: np.ndarray, select: np.ndarray) -> np.ndarray:
    if i.modifiers[0] != "b32":
        raise Fault("this mode of prmt is not in the interpreter")
    both = high.astype(U64) << U64.type(32) | low.astype(U64)
    result = np.zeros(1, U64)
    for n in range(4):
        chosen = select.astype(U64) >> U64.type(4 * n)
        byte = both >> ((chosen & U64.type(7)) * U64.type(8)) & U64.type(255)
        sign = np.where(byte & U64.type(128), U64.type(255), U64.type(0))
        result = result | np.where(chosen & U64.type(8), sign, byte) << U64.type(8 * n)
    return result.astype(U32).view(dtype)


def _extract(i: Instruction, dtype: np.dtype, x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits = 8 * dtype.itemsize
    start, length = (np.minimum(n & U32.type(255), U32.type(bits)).astype(U64) for n in (start, length))
    field = x.view(unsigned(dtype.itemsize)).astype(U64) >> np.minimum(start, U64.type(63))
    field = np.where(start >= bits, U64.type(0), field)
    ones = np.where(length >= 64, ~U64.type(0), (U64.type(1) << np.minimum(length, U64.type(63))) - U64.type(1))
    field = field & ones
    if dtype.kind == "i":
        last = np.minimum(start + length - U64.type(1), U64.type(bits - 1))
        negative = (x.view(unsigned(dtype.itemsize)).astype(U64) >> last & U64.type(1) == 1) & (length > 0)
        field = np.where(negative, field | ~ones, field)
    return field.astype(unsigned(dtype.itemsize)).view(dtype)


def _insert(
    i: Instruction, dtype: np.dtype, field: np.ndarray, into: np.ndarray, start: np.ndarray, length: np.ndarray
) -> np.ndarray:
    bits = 8 * dtype.itemsize
    start, length = ((n & U32.type(255)).astype(U64) for n in (start, length))
    ones = np.where(length >= 64, ~U64.type(0), (U64.type(1) << np.minimum(length, U64.type(63))) - U64.type(1))
    place = np.where(start >= bits, U64.type(0), ones << np.minimum(start, U64.type(63)))
    moved = field.astype(U64) << np.minimum(start, U64.type(63))
    return (into.astype(U64) & ~place | moved & place).astype(dtype)


def _bits_of(x: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(x).view(U8).reshape(x.size, -1), axis=1, bitorder="little")


def _count_ones(i: Instruction, dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    return _bits_of(x).sum(1).astype(U32)


def _leading_zeros(i: Instruction, dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    backwards = _bits_of(x)[:, ::-1]
    return np.where(backwards.any(1), backwards.argmax(1), 8 * dtype.itemsize).astype(U32)


def _highest_bit(i: Instruction, dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    x = np.where(x < 0, ~x, x) if dtype.kind == "i" else x
    zeros = _leading_zeros(i, dtype, x)
    # .shiftamt: by how much the bit would have to be shifted to become the highest
    place = zeros if "shiftamt" in i.modifiers else U32.type(8 * dtype.itemsize - 1) - zeros
    return np.where(zeros == 8 * dtype.itemsize, ~U32.type(0), place.astype(U32))


def _reverse(i: Instruction, dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    packed = np.packbits(_bits_of(x)[:, ::-1], axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view(unsigned(dtype.itemsize)).ravel()


def _logic(
    i: Instruction, dtype: np.dtype, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray
) -> np.ndarray:
    """lop3: any function of three bits, by its table."""
    table, result = int(table[0]), U32.type(0)
    for row in range(8):
        if table >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result | np.zeros(1, U32)


SPECIAL: dict[str, Callable] = {
    "div": _divide, "rem": _divide, "shl": _shift, "shr": _shift, "shf": _funnel_shift, "prmt": _permute,
    "bfe": _extract, "bfi": _insert, "popc": _count_ones, "clz": _leading_zeros, "bfind": _highest_bit, "brev": _reverse,
    "lop3": _logic,
}  # fmt: skip


def _kinds(name: str, kind: str) -> tuple[str, ...]:
    """The types of the operands of a special instruction."""
    if name in ("shl", "shr"):
        return kind, "u32"
    if name in ("bfe", "bfi"):
        return (kind, "u32", "u32") if name == "bfe" else (kind, kind, "u32", "u32")
    return ("b32",) * 4 if name in ("shf", "prmt", "lop3") else (kind,) * 2


def _compare(i: Instruction, operands: Operands, kind: str) -> Run:
    if i.name == "set":
        raise Fault("an instruction that the interpreter does not have")
    first, _, second = i.operands[0].partition("|")
    write, write_other = operands.write(first), operands.write(second) if second else None
    a, b = (_comparable(operands, text, kind) for text in i.operands[1:3])
    test, floating = i.modifiers[0], kind in FLOATS
    join = next((COMBINE[word] for word in i.modifiers if word in COMBINE), None)
    other = operands.read(i.operands[3], "pred") if join else None

    def run(t, m) -> None:
        x, y = a(t), b(t)
        result = _float_test(test, x, y) if floating else COMPARE[test](x, y)
        if kind in PACKED:  # a predicate for each half
            write(t, result[:, 0], m)
            write_other(t, result[:, 1], m)
            return
        if join is not None:
            write(t, join(result, other(t)), m)
            result = result if write_other is None else join(~result, other(t))
        else:
            write(t, result, m)
            result = ~result
        if write_other is not None:
            write_other(t, result, m)

    return run


def _comparable(operands: Operands, text: str, kind: str) -> Callable:
    read = operands.read(text, kind)
    if kind in PACKED:
        return lambda t: halves(read(t), kind)
    return (lambda t: bf16_to_f32(read(t))) if kind == "bf16" else read


def _float_test(test: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`lt` is false and `ltu` true where an operand is NaN."""
    if test in ("num", "nan"):
        unordered = np.isnan(x) | np.isnan(y)
        return unordered if test == "nan" else ~unordered
    result = COMPARE[test[:2]](x, y)
    if test.endswith("u") and len(test) == 3:
        return result | np.isnan(x) | np.isnan(y)
    return result & ~(np.isnan(x) | np.isnan(y)) if test == "ne" else result


def _move(i: Instruction, operands: Operands, kind: str) -> Run:
    target, source = i.operands
    if target.startswith("{"):
        parts = operands.vector(target)
        size = NUMPY[kind].itemsize // len(parts)
        read, writes, part = operands.read(source, kind), [operands.write(name) for name in parts], unsigned(size)
        whole = unsigned(NUMPY[kind].itemsize)

        def split(t, m) -> None:
            value = read(t).view(whole)
            for n, write in enumerate(writes):
                write(t, (value >> whole.type(8 * size * n)).astype(part), m)

        return split
    write = operands.write(target)
    if source.startswith("{"):
        parts = operands.vector(source)
        size, whole = NUMPY[kind].itemsize // len(parts), unsigned(NUMPY[kind].itemsize)
        reads = [operands.read(name, f"b{8 * size}") for name in parts]

        def pack(t, m) -> None:
            value = reads[0](t).astype(whole)
            for n, read in enumerate(reads[1:], 1):
                value = value | read(t).astype(whole) << whole.type(8 * size * n)
            write(t, value, m)

        return pack
    read = operands.read(source, kind)
    return lambda t, m: write(t, read(t), m)
