"""The instruments of `test_counts.py`: reading machine code, the way of a peaked row, and the model of a multiprocessor."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from machine_code import NO_SCOREBOARD, Instruction, parse
from processor import CARDS, Program, run
from ways import blocks, counted_loops, first_wide_load, loads_before_first_wait, path

# From the disassembly of a kernel for sm_90; the comments hold the 128 bits of an instruction, upper half below.
LISTING = """
	.section	.text.row_kernel,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000ff00000000800 */
        /*0010*/                   IABS R5, R0 ;                              /* 0x0000000000057213 */
                                                                              /* 0x001fe20000000000 */
.L_x_0:
        /*0020*/              @!P1 LDG.E.128 R4, desc[UR6][R2.64+0x10] ;      /* 0x0000001006049981 */
                                                                              /* 0x000ea2000c1e1d00 */
        /*0030*/                   MUFU.RCP R4, R4 ;                          /* 0x0000000400047308 */
                                                                              /* 0x020e620000001000 */
        /*0040*/              @P0  BRA `(.L_x_0) ;                            /* 0xfffffffc00000947 */
                                                                              /* 0x000fea000383ffff */
        /*0050*/                   EXIT ;                                     /* 0x000000000000794d */
                                                                              /* 0x000fea0003800000 */
	.section	.nv.info,"",@"SHT_CUDA_INFO"
        /*0060*/                   EXIT ;                                     /* 0x000000000000794d */
"""


def make(text: str, target: int | None = None, stall: int = 1, waits: tuple[int, ...] = (), board: int = NO_SCOREBOARD):
    guard, _, rest = text[1:].partition(" ") if text.startswith("@") else ("", "", text)
    opcode, _, operands = rest.partition(" ")
    names = tuple(x.strip() for x in operands.split(",")) if operands else ()
    return Instruction(text, guard, opcode, names, stall, board, NO_SCOREBOARD, waits, target)


LOAD, STORE, EXIT = make("LDG.E.128 R4", board=0), make("STG.E.128 R4"), make("EXIT")
ADD, EXPONENTIAL = make("FADD R1, R2, R3"), make("MUFU.EX2 R1, R2")


def test_instructions_and_their_control_codes_are_read():
    parsed = parse(LISTING)
    assert list(parsed) == ["row_kernel"]
    code = parsed["row_kernel"]
    assert [x.opcode for x in code] == ["LDC", "IABS", "LDG.E.128", "MUFU.RCP", "BRA", "EXIT"]
    assert [x.pipe for x in code] == ["lsu", "alu", "lsu", "xu", "control", "control"]
    assert (code[2].guard, code[2].width, code[2].is_load, code[2].result_scoreboard) == ("!P1", 16, True, 2)
    assert (code[0].stall, code[1].stall, code[1].waits, code[1].result_scoreboard) == (8, 1, (0,), NO_SCOREBOARD)
    assert (code[3].waits, code[3].result_scoreboard) == ((5,), 1)
    assert code[4].target == 2
    assert code[4].is_conditional
    assert not code[5].is_conditional
    assert blocks(code) == [(0, 2), (2, 5), (5, 6)]


def test_an_opcode_that_no_pipe_has_is_an_error_and_not_free():
    with pytest.raises(ValueError, match=r"no pipe for 'FNEW'"):
        _ = make("FNEW.X R1, R2").pipe


def test_the_way_skips_what_nothing_makes_it_do():
    code = [LOAD, make("@P0 BRA `(.L)", target=4), EXPONENTIAL, ADD, EXIT]
    assert path(code, (16, 0)) == [LOAD, code[1], EXIT]
    assert path(code, (16, 0), exponentials=1) == code


def test_the_way_loads_as_many_single_logits_as_it_is_made_to():
    """Without that, the way of a row that is finished on the spot could be the shorter one of a row that is not."""
    single = make("LDG.E.U16 R4, [R2.64]")
    code = [LOAD, make("@P0 BRA `(.L)", target=4), single, single, EXIT]
    assert path(code, (16, 0)) == [LOAD, code[1], EXIT]
    assert path(code, (16, 0), singles=2) == code
    with pytest.raises(ValueError, match="3 single logits"):
        path(code, (16, 0), singles=3)


def test_the_way_moves_exactly_what_a_row_has():
    code = [make("@P0 BRA `(.L)", target=3), LOAD, EXIT, ADD, ADD, LOAD, LOAD, STORE, EXIT]
    assert len(path(code, (16, 0))) == 3
    assert len(path(code, (32, 16))) == 7
    with pytest.raises(ValueError, match=r"no way loads and stores \(48, 0\)"):
        path(code, (48, 0))


def test_a_loop_goes_round_while_there_is_something_to_move():
    code = [LOAD, ADD, make("@P0 BRA `(.L)", target=0), EXIT]
    assert len(path(code, (64, 0))) == 4 * 3 + 1
    assert path(code, (16, 0), straight=True) == code
    with pytest.raises(ValueError, match="no way"):
        path(code, (64, 0), straight=True)


@pytest.mark.parametrize(("first", "second", "rounds"), [("VIADD", "ISETP", 4), ("ISETP", "VIADD", 5)])
def test_a_loop_that_counts_runs_as_often_as_it_counts(first, second, rounds):
    texts = {"VIADD": "VIADD R7, R7, 0x400", "ISETP": "ISETP.NE.AND P0, PT, R7, 0x1000, PT"}
    code = [ADD, make(texts[first]), make(texts[second]), make("@P0 BRA `(.L)", target=1), EXIT]
    assert counted_loops(code) == {3: rounds}
    assert len(path(code, (0, 0))) == 1 + 3 * rounds + 1


def test_calls_that_leave_the_kernel_are_no_way():
    code = [make("@P0 BRA `(.L)", target=3), LOAD, make("CALL.REL.NOINC `($slow)"), ADD, EXIT]
    assert len(path(code, (0, 0))) == 3
    with pytest.raises(ValueError, match="no way"):
        path(code, (16, 0))


def test_what_is_said_of_loads():
    wait = make("FADD R1, R4, R5", waits=(0,))
    assert first_wide_load([ADD, ADD, LOAD]) == 2
    assert first_wide_load([make("LDG.E R4"), ADD]) is None
    assert loads_before_first_wait([LOAD, LOAD, wait])
    assert not loads_before_first_wait([LOAD, wait, LOAD])
    assert loads_before_first_wait([LOAD, make("FADD R1, R4, R5", waits=(3,)), LOAD, wait])  # waits for something else


H100 = CARDS["H100"]


def clocks(code: list[Instruction], warps: int = 4, resident: int = 8, count: int = 40, card=H100) -> float:
    program = Program(code, warps, 32, 0)
    finished = run([program] * count, card, resident).finished
    return (finished[-resident] - finished[resident]) / (count - 2 * resident)


def test_the_memory_serves_its_bandwidth_and_no_more():
    code = [LOAD, LOAD, LOAD, LOAD, make("FADD R1, R4, R5", waits=(0,)), EXIT]
    assert clocks(code) == pytest.approx(4 * 512 * 4 / H100.bytes_per_clock, rel=0.02)
    assert clocks(code, card=replace(H100, copy=1e15)) < clocks(code) / 4


def test_pipes_have_their_rates():
    """4 warps are one for each scheduler; half of the lanes of the ALU and of the light unit work on a warp for two clocks."""
    alone = {name: clocks([make(f"{name} R1, R2, R3")] * 200) for name in ("FMNMX", "FADD", "MUFU.EX2")}
    assert alone["FMNMX"] == pytest.approx(400, rel=0.05)
    assert alone["FADD"] == pytest.approx(200, rel=0.05)
    assert alone["MUFU.EX2"] == pytest.approx(1600, rel=0.05)
    assert clocks([ADD] * 200, card=CARDS["A100"]) == pytest.approx(400, rel=0.05)
    both = clocks([make("FMNMX R1, R2, R3"), ADD] * 200)
    assert both == pytest.approx(400, rel=0.05)  # the other pipe is free meanwhile


def test_a_warp_waits_for_its_stalls_and_scoreboards_and_for_the_others():
    def life(code, warps=1):
        return run([Program(code, warps, 32, 0)], H100, 1).finished[0]

    assert life([make("FADD R1, R2, R3", stall=13), EXIT]) == 13
    load = make("LDG.E R4", board=2)
    assert life([load, make("FADD R1, R4, R4", waits=(2,)), EXIT]) == pytest.approx(H100.cache_latency, abs=3)
    assert life([make("BAR.SYNC 0x0"), EXIT], warps=4) > life([ADD, EXIT], warps=4)


def test_programs_fit_by_registers_shared_memory_and_warps():
    assert Program([], 4, 168, 1024).resident(H100) == 3
    assert Program([], 4, 32, 0).resident(H100) == 16
    assert Program([], 4, 32, 76 * 1024).resident(H100) == 2
