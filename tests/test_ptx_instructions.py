"""Each instruction of the PTX interpreter against numpy, with the values at which they differ most."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx.planted import apply

RNG = np.random.default_rng(0)
INF, NAN = np.float32(np.inf), np.float32(np.nan)
EDGES = np.array(
    [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-45, -1e-45, 2.0**-126, 3.4e38, 0.5, 127.0, 128.0, -149.0, -150.0]
)
FLOATS = np.concatenate([EDGES, RNG.standard_normal(240) * 10.0 ** RNG.integers(-30, 30, 240)]).astype(np.float32)
OTHERS = RNG.permutation(FLOATS)
INTS = np.concatenate([[0, 1, -1, 2**31 - 1, -(2**31), 31, 32, 33], RNG.integers(-(2**31), 2**31, 248)]).astype(
    np.int32
)
DIVISORS = np.where(RNG.permutation(INTS) == 0, 7, RNG.permutation(INTS)).astype(np.int32)
DIVISORS[DIVISORS == 0] = 7


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, any NaN for NaN."""
    if got.dtype.kind == "f":
        assert np.array_equal(np.isnan(got), np.isnan(expected))
        keep = ~np.isnan(got)
        got, expected = got[keep], expected[keep]
        assert np.array_equal(np.signbit(got), np.signbit(expected))
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.f32 %y, %x0, %x1;", np.add),
        ("sub.rn.f32 %y, %x0, %x1;", np.subtract),
        ("mul.f32 %y, %x0, %x1;", np.multiply),
        ("div.rn.f32 %y, %x0, %x1;", np.divide),
        ("div.full.f32 %y, %x0, %x1;", np.divide),
        ("neg.f32 %y, %x0;", lambda x, y: -x),
        ("abs.f32 %y, %x0;", lambda x, y: np.abs(x)),
        ("sqrt.rn.f32 %y, %x0;", lambda x, y: np.sqrt(x)),
        ("rcp.approx.f32 %y, %x0;", lambda x, y: 1 / x),
        ("mov.b32 %y, %x1;", lambda x, y: y),
    ],
)
def test_float_arithmetic(instruction, expected):
    with np.errstate(all="ignore"):
        same(apply(instruction, "f4", FLOATS, OTHERS), expected(FLOATS, OTHERS).astype(np.float32))


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_min_and_max_with_nan_and_signed_zeros(name, nan):
    x = np.array([NAN, 1.0, NAN, -0.0, 0.0, -INF], np.float32)
    y = np.array([1.0, NAN, NAN, 0.0, -0.0, INF], np.float32)
    got = apply(f"{name}{nan}.f32 %y, %x0, %x1;", "f4", x, y)
    zero, infinity = (-0.0, -INF) if name == "min" else (0.0, INF)
    one = NAN if nan else 1.0
    same(got, np.array([one, one, NAN, zero, zero, infinity], np.float32))


def test_nan_has_the_bits_of_a_gpu():
    got = apply("sub.f32 %y, %x0, %x1;", "f4", np.array([INF], np.float32), np.array([INF], np.float32))
    assert got.view(np.uint32)[0] == 0x7FFFFFFF


def rounded_once(x: float, y: float, z: float) -> np.float32:
    """x * y + z to the nearest float32, from exact fractions."""
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    near = np.float32(float(exact))
    around = [np.nextafter(near, -INF), near, np.nextafter(near, INF)]
    by_distance = sorted(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1))
    return by_distance[0]


def test_fma_rounds_once():
    tiny = np.float32(2.0**-60)
    x = np.array([1 + 2.0**-12, 1 + 2.0**-12, 1 + 2.0**-12, 3.0, 2.0**-75, -(1 + 2.0**-12)], np.float32)
    y = np.array([1 + 2.0**-12, 1 + 2.0**-12, 1.0, 5.0, 2.0**-75, 1 + 2.0**-12], np.float32)
    z = np.array([tiny, -tiny, 2.0**-24, -15.0, 2.0**-149, tiny], np.float32)
    hard = [(a, b, c) for a, b, c in zip(x, y, z, strict=True)]
    a, b = (RNG.standard_normal(200).astype(np.float32) for _ in range(2))
    c = (-(a.astype(np.float64) * b) * (1 + RNG.choice([0.0, 1e-7, 2.0**-24], 200))).astype(np.float32)
    hard += list(zip(a, b, c, strict=True))
    expected = np.array([rounded_once(*map(float, case)) for case in hard], np.float32)
    x, y, z = (np.array(part, np.float32) for part in zip(*hard, strict=True))
    same(apply("fma.rn.f32 %y, %x0, %x1, %x2;", "f4", x, y, z), expected)
    with np.errstate(all="ignore"):
        twice = (x.astype(np.float64) * y + z).astype(np.float32)
    assert (twice != expected).any()  # rounding to float64 first is not enough


def test_contraction_is_what_ptxas_does():
    x, y, z = (RNG.standard_normal(256).astype(np.float32) for _ in range(3))
    fused = np.array([rounded_once(*map(float, case)) for case in zip(x, y, z, strict=True)], np.float32)
    less = np.array([rounded_once(-float(a), float(b), float(c)) for a, b, c in zip(x, y, z, strict=True)], np.float32)
    product = "mul.f32 %r2, %x0, %x1;"
    for body, contract, expected in (
        (product + "add.f32 %y, %r2, %x2;", True, fused),
        (product + "add.f32 %y, %x2, %r2;", True, fused),
        (product + "sub.f32 %y, %x2, %r2;", True, less),
        (product + "sub.f32 %y, %r2, %x2;", True, -less),
        (product + "add.f32 %y, %r2, %x2;", False, x * y + z),
        (product + "add.rn.f32 %y, %r2, %x2;", True, x * y + z),
        ("mul.rn.f32 %r2, %x0, %x1; add.f32 %y, %r2, %x2;", True, x * y + z),
        (product + "add.f32 %y, %r2, %x2; mov.b32 %r3, %r2;", True, x * y + z),  # the product has another use
        (product + "mov.b32 %x0, 0; add.f32 %y, %r2, %x2;", True, x * y + z),  # its factor is gone
    ):
        same(apply(body, "f4", x, y, z, contract=contract), expected)
    assert (fused != x * y + z).any()


def test_ex2_and_lg2_at_their_special_values():
    with np.errstate(over="ignore"):
        same(apply("ex2.approx.f32 %y, %x0;", "f4", FLOATS), np.exp2(FLOATS.astype(np.float64)).astype(np.float32))
    x = np.array([-INF, INF, NAN, 0.0, -127.0, -126.0, 128.0, 1e-45], np.float32)
    got = apply("ex2.approx.ftz.f32 %y, %x0;", "f4", x)
    same(got, np.array([0, INF, NAN, 1, 0, 2.0**-126, INF, 1], np.float32))  # denormals are zeros, of the result too
    got = apply("lg2.approx.f32 %y, %x0;", "f4", np.array([0.0, -0.0, 1.0, INF, -1.0, 8.0, 2.0**-140], np.float32))
    same(got, np.array([-INF, -INF, 0, INF, NAN, 3, -140], np.float32))


@pytest.mark.parametrize(
    ("instruction", "exact", "bound"),
    [
        ("ex2.approx.f32", np.exp2, 2.0**-22),
        ("rcp.approx.f32", np.reciprocal, 2.0**-23),
        ("rsqrt.approx.f32", lambda x: x**-0.5, 2.0**-22.9),
        ("lg2.approx.f32", np.log2, 2.0**-22),
    ],
)
def test_perturbed_as_far_as_the_manual_allows(instruction, exact, bound):
    x = RNG.uniform(2.5, 90.0, 256).astype(np.float32)
    text, truth = f"{instruction} %y, %x0;", exact(x.astype(np.float64))
    errors = [np.abs(apply(text, "f4", x, perturb=1.0, seed=seed) / truth - 1) for seed in (0, 1)]
    for error in errors:
        assert bound / 2 < error.max() < bound + 2.0**-24  # its own rounding on top
    assert not np.array_equal(*errors)
    assert np.array_equal(apply(text, "f4", x, perturb=1.0), apply(text, "f4", x, perturb=1.0))
    whole = np.array([1.0, 2.0, 4.0, 64.0], np.float32)  # whole powers of two are exact on the chip
    if "rsqrt" not in instruction:
        assert np.array_equal(apply(text, "f4", whole, perturb=1.0), exact(whole.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %y, %x0, %x1;", lambda x, y: x + y),
        ("mul.lo.s32 %y, %x0, %x1;", lambda x, y: x * y),
        ("mul.hi.s32 %y, %x0, %x1;", lambda x, y: (x.astype(np.int64) * y) >> 32),
        ("mul.hi.u32 %y, %x0, %x1;", lambda x, y: (x.view("u4").astype("u8") * y.view("u4")) >> np.uint64(32)),
        ("mad.lo.s32 %y, %x0, %x1, %x0;", lambda x, y: x * y + x),
        ("div.s32 %y, %x0, %x1;", lambda x, y: np.trunc(x.astype(np.float64) / y)),
        ("rem.s32 %y, %x0, %x1;", lambda x, y: np.fmod(x.astype(np.int64), y)),
        ("div.u32 %y, %x0, %x1;", lambda x, y: x.view("u4") // y.view("u4")),
        ("rem.u32 %y, %x0, %x1;", lambda x, y: x.view("u4") % y.view("u4")),
        ("min.s32 %y, %x0, %x1;", np.minimum),
        ("max.u32 %y, %x0, %x1;", lambda x, y: np.maximum(x.view("u4"), y.view("u4"))),
        ("shl.b32 %y, %x0, 5;", lambda x, y: x << 5),
        ("shl.b32 %y, %x0, 32;", lambda x, y: x * 0),
        ("shr.s32 %y, %x0, 40;", lambda x, y: x >> 31),
        ("shr.u32 %y, %x0, 7;", lambda x, y: x.view("u4") >> 7),
        ("xor.b32 %y, %x0, -1;", lambda x, y: ~x),
        ("not.b32 %y, %x0;", lambda x, y: ~x),
        ("and.b32 %y, %x0, %x1;", np.bitwise_and),
        ("popc.b32 %y, %x0;", lambda x, y: np.array([bin(v & 0xFFFFFFFF).count("1") for v in x.tolist()])),
        ("clz.b32 %y, %x0;", lambda x, y: np.array([32 - (v & 0xFFFFFFFF).bit_length() for v in x.tolist()])),
        (
            "bfind.shiftamt.u32 %y, %x0;",
            lambda x, y: np.array([32 - (v & 0xFFFFFFFF).bit_length() if v else -1 for v in x.tolist()]),
        ),
        ("bfe.u32 %y, %x0, 5, 9;", lambda x, y: x.view("u4") >> 5 & 511),
        ("bfe.s32 %y, %x0, 5, 9;", lambda x, y: x << 18 >> 23),
        ("bfi.b32 %y, %x0, %x1, 5, 9;", lambda x, y: y & ~(511 << 5) | (x & 511) << 5),
        ("shf.l.wrap.b32 %y, %x0, %x1, 36;", lambda x, y: y << 4 | (x >> 28) & 15),
        ("shf.r.wrap.b32 %y, %x0, %x1, 4;", lambda x, y: (x >> 4) & (2**28 - 1) | y << 28),
        ("shf.r.clamp.b32 %y, %x0, %x1, 99;", lambda x, y: y),
        ("prmt.b32 %y, %x0, %x1, 0x5410;", lambda x, y: x & 0xFFFF | y << 16),
        ("prmt.b32 %y, %x0, %x1, 0x7632;", lambda x, y: (x >> 16) & 0xFFFF | y >> 16 << 16),
        ("prmt.b32 %y, %x0, %x1, 0x888B;", lambda x, y: (x >> 31) & 0xFF | np.where(x & 128, -256, 0)),
        ("lop3.b32 %y, %x0, %x1, %x0, 0x3C;", lambda x, y: x ^ y),
        (
            "{ .reg .b16 %h, %l; mov.b32 {%l, %h}, %x0; mov.b32 %y, {%h, %l}; }",
            lambda x, y: x << 16 | (x >> 16) & 0xFFFF,
        ),
        ("setp.lt.u32 %p1, %x0, %x1; selp.b32 %y, 1, 0, %p1;", lambda x, y: x.view("u4") < y.view("u4")),
        ("setp.ge.s32 %p1|%p2, %x0, %x1; selp.b32 %y, 1, 0, %p2;", lambda x, y: x < y),
    ],
)
def test_integers(instruction, expected):
    with np.errstate(all="ignore"):
        same(apply(instruction, "i4", INTS, DIVISORS), expected(INTS, DIVISORS).astype(np.int64).astype(np.int32))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("mul.wide.s32 %y, %x0, %x1;", lambda x, y: x.astype(np.int64) * y),
        ("mad.wide.u32 %y, %x0, %x1, 5;", lambda x, y: (x.view("u4").astype("u8") * y.view("u4") + 5).view("i8")),
        ("cvt.s64.s32 %y, %x0;", lambda x, y: x.astype(np.int64)),
        ("cvt.u64.u32 %y, %x0;", lambda x, y: x.view("u4").astype(np.int64)),
        ("mov.b64 %y, {%x0, %x1};", lambda x, y: (y.astype(np.int64) << 32) | x.view("u4").astype(np.int64)),
    ],
)
def test_wide_integers(instruction, expected):
    same(apply(instruction, "i8", INTS, DIVISORS), expected(INTS, DIVISORS))


@pytest.mark.parametrize("test", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_with_nan(test):
    """The plain ones are false where an operand is NaN, those with u true."""
    unordered = np.isnan(FLOATS) | np.isnan(OTHERS)
    ordered = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}.get(
        test, np.greater if test == "gt" else np.greater_equal
    )(FLOATS, OTHERS) & ~unordered
    for suffix, expected in (("", ordered), ("u", ordered | unordered)):
        body = f"setp.{test}{suffix}.f32 %p1, %x0, %x1; selp.b32 %y, 1, 0, %p1;"
        assert np.array_equal(apply(body, "i4", FLOATS, OTHERS), expected)
    assert np.array_equal(
        apply("setp.num.f32 %p1, %x0, %x1; selp.b32 %y, 1, 0, %p1;", "i4", FLOATS, OTHERS), ~unordered
    )


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision_there_and_back(kind, dtype):
    ties = (1 + (2 * np.arange(64) + 1) * 2.0**-12).astype(np.float32)
    ties = np.concatenate([ties, (1 + (2 * np.arange(64) + 1) * 2.0**-9).astype(np.float32), FLOATS])
    narrow = torch.from_numpy(ties).to(dtype)
    got = apply(f"cvt.rn.{kind}.f32 %y, %x0;", "i2", ties)
    numbers = ~np.isnan(ties)
    assert np.array_equal(got[numbers], narrow.view(torch.int16).numpy()[numbers])
    assert torch.from_numpy(got[~numbers]).view(dtype).isnan().all()
    same(apply(f"cvt.f32.{kind} %y, %x0;", "f4", got), narrow.float().numpy())
    packed = apply(f"cvt.rn.{kind}x2.f32 %y, %x0, %x0;", "u4", ties)
    assert np.array_equal(packed, got.view(np.uint16).astype(np.uint32) * 65537)


def test_floats_to_integers_and_back():
    got = apply("cvt.rzi.s32.f32 %y, %x0;", "i4", np.array([2.9, -2.9, NAN, INF, -INF, 3e9], np.float32))
    assert got.tolist() == [2, -2, 0, 2**31 - 1, -(2**31), 2**31 - 1]
    same(apply("cvt.rn.f32.s32 %y, %x0;", "f4", INTS), INTS.astype(np.float32))
    same(apply("cvt.rn.f32.u32 %y, %x0;", "f4", INTS), INTS.view(np.uint32).astype(np.float32))
    same(apply("cvt.rni.f32.f32 %y, %x0;", "f4", FLOATS), np.rint(FLOATS))


def test_pairs_of_floats():
    pairs = [RNG.standard_normal(64).astype(np.float32) for _ in range(2)]
    x, y = (p.view(np.uint64) for p in pairs)
    same(apply("add.f32x2 %y, %x0, %x1;", "u8", x, y).view(np.float32), pairs[0] + pairs[1])
    same(apply("mul.f32x2 %y, %x0, 0;", "u8", x).view(np.float32), pairs[0] * np.float32(0))


WARPS = INTS.reshape(-1, 32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("shfl.sync.bfly.b32 %y, %x0, 5, 31, -1;", WARPS[:, np.arange(32) ^ 5]),
        (
            "shfl.sync.up.b32 %y, %x0, 3, 0, -1;",
            WARPS[:, np.maximum(np.arange(32) - 3, np.arange(32) * (np.arange(32) < 3))],
        ),
        ("shfl.sync.idx.b32 %y, %x0, 7, 31, -1;", WARPS[:, [7] * 32]),
        (
            "shfl.sync.down.b32 %y|%p1, %x0, 16, 31, -1; @!%p1 mov.b32 %y, 0;",
            np.hstack([WARPS[:, 16:], WARPS[:, 16:] * 0]),
        ),
        ("redux.sync.min.s32 %y, %x0, -1;", np.repeat(WARPS.min(1), 32)),
        ("redux.sync.max.s32 %y, %x0, -1;", np.repeat(WARPS.max(1), 32)),
        ("redux.sync.add.s32 %y, %x0, -1;", np.repeat(WARPS.sum(1, dtype=np.int32), 32)),
        ("setp.lt.s32 %p1, %x0, 0; vote.sync.any.pred %p2, %p1, -1; selp.b32 %y, 1, 0, %p2;", np.ones(256)),
        (
            "setp.lt.s32 %p1, %x0, 0; vote.sync.ballot.b32 %y, %p1, -1;",
            np.repeat(((WARPS < 0) * 2 ** np.arange(32)).sum(1).astype(np.uint32).view(np.int32), 32),
        ),
    ],
)
def test_warps(instruction, expected):
    assert np.array_equal(apply(instruction, "i4", INTS), np.ravel(expected))


def test_redux_of_floats_passes_over_nan():
    x = np.where(np.arange(32) == 3, NAN, np.arange(32)).astype(np.float32)
    assert apply("redux.sync.max.f32 %y, %x0, -1;", "f4", x).tolist() == [31.0] * 32
    assert np.isnan(apply("redux.sync.max.NaN.f32 %y, %x0, -1;", "f4", x)).all()
