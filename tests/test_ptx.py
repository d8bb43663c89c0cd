"""The PTX interpreter refuses what a GPU would do wrong: each check is seen to fire on a small planted kernel."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.dtypes import Fault
from ptx.planted import run


def words(count: int) -> np.ndarray:
    return np.zeros(count, np.uint32)


def check(body: str, message: str | None, size: int = 256, **options) -> None:
    """The body is refused with a message, or with None it runs."""
    if message is None:
        run(body, words(size), words(size), **options)
        return
    with pytest.raises(Fault, match=message) as refused:
        run(body, words(size), words(size), **options)
    assert str(refused.value).startswith("planted: ")
    assert any(
        line.strip() in str(refused.value) for line in (body + ";ret").split(";") if line.strip()
    )  # the instruction's text


@pytest.mark.parametrize(
    ("offset", "message"), [(16, None), (4, "misaligned access: 16 bytes at .* 4 past a multiple")]
)
def test_alignment_of_a_vector_load(offset, message):
    given = words(64)
    offset += -given.ctypes.data % 16
    body = f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd1+{offset}];"
    if message is None:
        run(body, given, words(1))
    else:
        with pytest.raises(Fault, match=message):
            run(body, given, words(1))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s64 %rd5, %rd1, %rd3; ld.global.b32 %r2, [%rd5];", None),
        ("add.s64 %rd5, %rd1, %rd3; ld.global.b32 %r2, [%rd5+4];", "outside every allocation|over the end"),
        ("add.s64 %rd5, %rd1, %rd3; ld.global.b32 %r2, [%rd5+-4];", "outside every allocation"),
        ("st.global.b32 [%rd4+4], %r1;", "outside every allocation|over the end"),
        ("mov.b32 %r2, space; st.shared.b32 [%r2+252], 1;", None),
        ("mov.b32 %r2, space; st.shared.b32 [%r2+256], 1;", "outside the block's 256 bytes of shared memory"),
        ("st.shared.v2.b32 [space+4], {%r1, %r1};", "misaligned access: 8 bytes at offset 4"),
    ],
)
def test_bounds(body, message):
    check(body, message, size=32)


WRITE = (
    "shl.b32 %r2, %r1, 2; mov.b32 %r3, space; add.s32 %r4, %r3, %r2; xor.b32 %r5, %r4, 128; st.shared.b32 [%r4], %r1;"
)
READ = "ld.shared.b32 %r6, [%r5];"  # what the other warp wrote
BARRIER = "bar.sync 0;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (WRITE + BARRIER + READ, None),
        (WRITE + READ, "shared memory is read with no barrier since another warp wrote it"),
        (WRITE + BARRIER + READ + "st.shared.b32 [%r4], 1;", "written with no barrier since another warp read it"),
        (WRITE + BARRIER + READ + BARRIER + "st.shared.b32 [%r4], 1;", None),
        (WRITE + "st.shared.b32 [%r5], 1;", "written with no barrier since another warp wrote it"),
        (WRITE + "ld.shared.b32 %r6, [%r4];", None),  # its own
        ("ld.shared.b32 %r6, [space];", "read that nothing has written"),
        ("st.shared.b32 [space], %r1;", "two threads of one instruction write different values"),
        ("st.shared.b32 [space], 7;", None),
    ],
)
def test_races_in_shared_memory(body, message):
    check(body, message, threads=64)


def test_a_read_by_a_third_warp_is_not_forgotten():
    """Warp 0 reads last, but it was warp 2 whose read the write of warp 0 may overtake."""
    body = (
        WRITE + BARRIER + "setp.ge.u32 %p1, %r1, 64; @%p1 ld.shared.b32 %r6, [space];"
        "setp.lt.u32 %p2, %r1, 32; @%p2 ld.shared.b32 %r6, [space]; setp.eq.u32 %p3, %r1, 0; @%p3 st.shared.b32 [space], 1;"
    )
    check(body, "written with no barrier since another warp read it", threads=96, shared=512)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L1; bar.sync 0; $L1: bar.sync 0;",
            "wait at different barriers|have ended",
        ),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra $L1; bar.sync 0; $L1:", "not all threads of the block reach"),
        ("setp.lt.u32 %p1, %r1, 7; @%p1 bra $L1; bar.sync 0; $L1:", "a part of a warp reaches"),
        ("setp.lt.u32 %p1, %r1, 7; @%p1 bra $L1; add.s32 %r2, %r1, 1; $L1: bar.sync 0;", None),
    ],
)
def test_barriers(body, message):
    check(body, message, threads=64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;", None),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r2, %r1, 16, 31, 65535;", "a thread that does not run it"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r2, %r1, 8, 31, 65535;", None),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r2, %r1, 8, 31, -1;", "names threads that do not run"),
        ("shfl.sync.bfly.b32 %r2, %r1, 1, 31, 255;", "not in its own member mask"),
    ],
)
def test_shuffles_from_threads_that_are_not_there(body, message):
    check(body, message)


BLOCK = "mov.u32 %r2, %ctaid.x; mul.wide.u32 %rd5, %r2, 4; add.s64 %rd6, %rd2, %rd5; setp.eq.u32 %p1, %r1, 0;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BLOCK + "@%p1 st.global.b32 [%rd6], %r2;", None),
        (BLOCK + "@%p1 st.global.b32 [%rd6], %r2; bar.sync 0; ld.global.b32 %r3, [%rd2];", "another block wrote it"),
        (BLOCK + "ld.global.b32 %r3, [%rd2]; bar.sync 0; @%p1 st.global.b32 [%rd6], %r2;", "another block read it"),
        (BLOCK + "@%p1 st.global.b32 [%rd2], 5;", "written with no release and acquire since another block wrote it"),
        (BLOCK + "@%p1 st.global.b32 [%rd6], %r2; ld.global.b32 %r3, [%rd6];", "no barrier since another warp"),
        (BLOCK + "@%p1 st.global.b32 [%rd6], %r2; bar.sync 0; ld.global.b32 %r3, [%rd6];", None),
    ],
)
def test_races_in_global_memory(body, message):
    order = np.array([2, 1, 0] if message == "another block read it" else [0, 1, 2])
    check(body, message, threads=64, blocks=3, at_once=1, order=order)


LAST_BLOCK = (
    BLOCK + "@%p1 st.global.b32 [%rd6], 5; bar.sync 0; @!%p1 bra $ARRIVED; {release}"
    "atom.global.add.u32 %r3, [%rd1], 1; {acquire} setp.ne.s32 %p2, %r3, 3; @%p2 bra $ARRIVED;"
    "ld.global.b32 %r4, [%rd2]; ld.global.b32 %r5, [%rd2+4]; ld.global.b32 %r6, [%rd2+8]; ld.global.b32 %r7, [%rd2+12];"
    "add.s32 %r4, %r4, %r5; add.s32 %r6, %r6, %r7; add.s32 %r4, %r4, %r6; st.global.b32 [%rd2+16], %r4; $ARRIVED:"
)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(("release", "acquire"), [(True, True), (False, True), (True, False)])
def test_the_last_block_needs_a_fence_on_both_sides(order, at_once, release, acquire):
    fence = "membar.gl;"
    body = LAST_BLOCK.format(release=fence * release, acquire=fence * acquire)
    options = {"threads": 64, "blocks": 4, "order": np.array(order), "at_once": at_once}
    if release and acquire:
        assert run(body, words(4), words(8), **options)[4] == 20
    else:
        with pytest.raises(Fault, match="release and acquire"):
            run(body, words(4), words(8), **options)


ONE_ATOMIC = (
    "mov.u32 %r2, %ctaid.x; mul.wide.u32 %rd5, %r2, 4; add.s64 %rd6, %rd2, %rd5; setp.eq.u32 %p1, %r1, 32;"
    "@%p1 st.global.b32 [%rd6], 5; {before} setp.eq.u32 %p2, %r1, 0;"
    "@%p2 atom.global.gpu.{meaning}.add.u32 %r3, [%rd1], 1; {after}"
    "setp.ne.u32 %p3, %r2, {last}; @%p3 bra $DONE; @%p2 bra $DONE; ld.global.b32 %r4, [%rd2+{first}];"
    "st.global.b32 [%rd4+16], %r4; $DONE:"
)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize(
    ("before", "meaning", "after", "sound"),
    [
        (BARRIER, "acq_rel", BARRIER, True),
        (BARRIER, "relaxed", BARRIER, False),
        (BARRIER, "acquire", BARRIER, False),
        (BARRIER, "release", BARRIER, False),
        ("", "acq_rel", BARRIER, False),  # another warp than that of the atomic wrote
        (BARRIER, "acq_rel", "", False),  # another warp than that of the atomic reads
    ],
)
def test_one_atomic_stands_for_its_block_between_two_barriers(order, before, meaning, after, sound):
    body = ONE_ATOMIC.format(before=before, meaning=meaning, after=after, last=order[-1], first=4 * order[0])
    options = {"threads": 64, "blocks": 4, "order": np.array(order), "at_once": 1}
    if sound:
        assert run(body, words(4), words(80), **options)[5:68].tolist() == [5] * 63
    else:
        with pytest.raises(Fault, match="read with no release and acquire since another block wrote it"):
            run(body, words(4), words(80), **options)


def test_threads_that_branch_apart_meet_again():
    body = """
    setp.lt.u32 %p1, %r1, 10; mov.b32 %r2, 0; mov.b32 %r3, %r1; @%p1 bra $LOOP; add.s32 %r2, %r2, 1000; bra.uni $END;
    $LOOP: add.s32 %r2, %r2, %r3; add.s32 %r3, %r3, -1; setp.gt.s32 %p2, %r3, 0; @%p2 bra $LOOP;
    $END: shfl.sync.idx.b32 %r4, %r2, 9, 31, -1; add.s32 %r2, %r2, %r4; st.global.b32 [%rd4], %r2;
    """
    expected = [n * (n + 1) // 2 + 45 if n < 10 else 1045 for n in range(32)]
    assert run(body, words(1), words(32)).tolist() == expected


def test_a_register_of_an_inner_block_is_another_one():
    body = "mov.b32 %r2, 7; { .reg .b32 %r2; mov.b32 %r2, 9; } st.global.b32 [%rd4], %r2;"
    assert run(body, words(1), words(32)).tolist() == [7] * 32


def test_an_endless_kernel_and_an_unknown_instruction(monkeypatch):
    monkeypatch.setattr("ptx.schedule.ENDLESS", 50)
    with pytest.raises(Fault, match="planted: it does not end"):
        run("$L1: bra.uni $L1;", words(1), words(1))
    with pytest.raises(Fault, match=r"planted: cp\.async\.ca.*not in the interpreter"):
        run("cp.async.ca.shared.global [space], [%rd1], 16;", words(1), words(1))


def test_matrices_go_through_shared_memory():
    """Thread t stores halves 2t and 2t + 1 of an 8 x 8 matrix and loads them again, and sees row t / 4 of what a row's thread
    points to."""
    body = """
    and.b32 %r2, %r1, 7; shl.b32 %r2, %r2, 4; mov.b32 %r3, space; add.s32 %r3, %r3, %r2; add.s32 %r4, %r1, 65536;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r4}; xor.b32 %r3, %r3, 16;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r3]; st.global.b32 [%rd4], %r5;
    """
    assert run(body, words(1), words(32)).tolist() == [65536 + (t ^ 4) for t in range(32)]
