"""Read the machine code of a cubin: instructions with their control codes, and the path that a peaked row takes through them.

The disassembler prints each instruction with its 128 bits. The upper ones are the control codes, by which the hardware issues:

    bits 105-108   stall: clocks until the warp may issue its next instruction
    bits 110-112   the scoreboard that is released when the result is there (7: none)
    bits 113-115   the scoreboard that is released when the operands are read (7: none)
    bits 116-121   the scoreboards that the instruction waits for, one bit each

(Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826, section 2.1; unchanged since.)
"""

from __future__ import annotations

import heapq
import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

NO_SCOREBOARD = 7
WIDE = 16
"""Bytes of the loads and stores of a thread that move logits; what is narrower moves a row's statistics."""
PIPES = {
    "alu": "BMSK CS2R F2FP P2R R2P FCHK FMNMX FMNMX3 FSEL FSET FSETP FSWZADD HMNMX2 I2FP I2IP IABS IADD IADD3 IADD64 IDP IMNMX ISCADD ISETP LEA "
    "LOP3 MOV PLOP3 PRMT SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE",
    "fma": "FADD FADD2 FFMA FFMA2 FMUL FMUL2",
    "heavy": "HADD2 HFMA2 HMUL2 HSET2 HSETP2 IMAD",  # the half of the FMA pipe that also has integers and float16
    "xu": "BREV F2F F2I FLO FRND I2F I2I MUFU POPC",
    "lsu": "ATOM ATOMG ATOMS CCTL ERRBAR FENCE LD LDC LDG LDGSTS LDL LDS LDSM MATCH MEMBAR R2UR RED REDG REDUX S2R S2UR SHFL "
    "ST STAS STG STL STS STSM UCGABAR_ARV UCGABAR_WAIT",
    "uniform": "LDCU R2B UFLO UIADD3 UIMAD UISETP ULDC ULEA ULOP3 UMOV UP2UR UPLOP3 UPOPC UPRMT USEL USGXT USHF UFSETP UFMUL UFADD UFFMA "
    "UI2FP UFSEL UFMNMX UIADD3 VOTEU",
    "control": "ACQBULK BAR BPT BRA BREAK BRX BSSY BSYNC CALL DEPBAR EXIT KILL NANOSLEEP NOP PREEXIT RET WARPSYNC YIELD",
}
"""The pipe that executes an opcode on sm_80 to sm_100: throughput table of the CUDA C++ Programming Guide, "Arithmetic Instructions"."""
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
MEMORY = {"LDG", "STG", "LD", "ST"}

_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),")
_OTHER_SECTION = re.compile(r"^\s*\.section\s")
_LABEL = re.compile(r"^(\.L_\w+):")
_FIRST_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND_LINE = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_GUARD = re.compile(r"^@(!?U?P\w+)\s+")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_PREDICATE = re.compile(r"^!?U?P\d$")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its guard ("" or "!P0"), opcode with suffixes, operands, control codes, and the index it may branch to."""

    text: str
    guard: str
    opcode: str
    operands: tuple[str, ...]
    stall: int
    result_scoreboard: int
    operands_scoreboard: int
    waits: tuple[int, ...]
    target: int | None

    @property
    def name(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        """The pipe that executes it; ValueError for an opcode that PIPES lacks, which must not be counted as nothing."""
        if self.name not in PIPE_OF:
            raise ValueError(f"machine_code.PIPES has no pipe for {self.name!r} of {self.text!r}")
        return PIPE_OF[self.name]

    @property
    def width(self) -> int:
        """Bytes that a thread's load or store moves."""
        for suffix, width in ((".256", 32), (".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
            if suffix in self.opcode:
                return width
        return 4

    @property
    def is_global(self) -> bool:
        """Whether it reads or writes global memory."""
        return self.name in MEMORY

    @property
    def is_load(self) -> bool:
        """Whether it reads global memory."""
        return self.name in ("LDG", "LD")

    @property
    def is_conditional(self) -> bool:
        """Whether a branch or an exit can go either way. (BRA.DIV guards against warps that have come apart: never taken.)"""
        return bool(self.guard) or any(_PREDICATE.match(operand) for operand in self.operands)


def find_tool(name: str) -> str:
    """The path of nvdisasm or cuobjdump: triton's own, or else the one on the PATH."""
    spec = find_spec("triton")
    own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else None
    found = str(own) if own and own.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in triton nor on the PATH")
    return found


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of a cubin, by its name as the source has it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_tool("nvdisasm"), "-hex", "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = parse(text)
    return dict(zip(demangle(list(sections)), sections.values(), strict=True))


def demangle(names: list[str]) -> list[str]:
    """C++ names as the source has them; other names as they are."""
    if not any(name.startswith("_Z") for name in names):
        return names
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each section of `nvdisasm -hex -c`, by the section's name."""
    raw: dict[str, list[tuple[str, int]]] = {}
    labels: dict[str, int] = {}
    section, waiting, first = None, [], None
    for line in text.splitlines():
        if match := _SECTION.match(line):
            section, waiting, first = match.group(1), [], None
            raw[section] = []
        elif _OTHER_SECTION.match(line):
            section = None
        elif section is None:
            continue
        elif match := _LABEL.match(line):
            waiting.append(match.group(1))
        elif match := _FIRST_LINE.match(line):
            first = match.group(2)
        elif (match := _SECOND_LINE.match(line)) and first is not None:
            labels |= dict.fromkeys(waiting, len(raw[section]))
            raw[section].append((first, int(match.group(1), 16)))
            waiting, first = [], None
    return {name: [_instruction(words, high, labels) for words, high in lines] for name, lines in raw.items()}


def _instruction(text: str, high: int, labels: dict[str, int]) -> Instruction:
    guard = _GUARD.match(text)
    opcode, _, rest = text[guard.end() if guard else 0 :].partition(" ")
    target = _TARGET.search(rest)
    control = high >> 41
    return Instruction(
        text=text,
        guard=guard.group(1) if guard else "",
        opcode=opcode,
        operands=tuple(operand.strip() for operand in rest.split(",")) if rest.strip() else (),
        stall=control & 15,
        result_scoreboard=control >> 5 & 7,
        operands_scoreboard=control >> 8 & 7,
        waits=tuple(board for board in range(6) if control >> 11 + board & 1),
        target=labels.get(target.group(1)) if target else None,
    )


def successors(code: list[Instruction], index: int) -> list[int]:
    """Where a thread may be after the instruction at `index`; len(code) stands for its end."""
    instruction = code[index]
    if instruction.name == "EXIT":
        return [len(code), index + 1] if instruction.is_conditional else [len(code)]
    if instruction.name == "BRA" and not instruction.opcode.startswith("BRA.DIV"):
        return [instruction.target, index + 1] if instruction.is_conditional else [instruction.target]
    if instruction.name in ("RET", "CALL", "BRX", "KILL", "BPT"):
        return []  # the slow way of a division, an indirect jump, a trap: no path of ours goes there
    return [index + 1]


def blocks(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, end) of the basic blocks, in the order of the code."""
    leaders = {0}
    for index, instruction in enumerate(code):
        if instruction.name in ("BRA", "EXIT", "RET", "CALL", "BRX"):
            leaders |= {index + 1} | ({instruction.target} if instruction.target is not None else set())
    starts = sorted(leader for leader in leaders if leader < len(code))
    return list(zip(starts, [*starts[1:], len(code)], strict=True))


def counted_loops(code: list[Instruction]) -> dict[int, int]:
    """{index of the branch that closes a loop: how often its body runs}, of the loops with a number of rounds in the code.

    Such a branch tests whether a register differs from an immediate bound (or has not reached it); the register grows by an
    immediate step in the body, from zero, as the counters of Triton's `for i in range(N)` do.
    """
    found = {}
    for index, branch in enumerate(code):
        if branch.name != "BRA" or branch.target is None or branch.target >= index or not branch.is_conditional:
            continue
        predicate = (branch.guard or branch.operands[0]).lstrip("!")
        body = list(enumerate(code[branch.target : index]))
        tests = [
            (at, x) for at, x in body if x.name == "ISETP" and predicate in x.operands[:2] and ".EX" not in x.opcode
        ]
        if not tests or not tests[-1][1].operands[3].startswith("0x") or ".GT" in tests[-1][1].opcode:
            continue
        tested, test = tests[-1]
        counter, bound = test.operands[2].removesuffix(".reuse"), int(test.operands[3], 16)
        grows = ((at, x) for at, x in body if x.name in ("IADD3", "VIADD", "IADD") and x.operands[0] == counter)
        steps = [(at, int(y, 16)) for at, x in grows for y in x.operands[1:] if y.startswith("0x")]
        if steps and bound % steps[-1][1] == 0:
            found[index] = bound // steps[-1][1] + (steps[-1][0] > tested)
    return found


def path(code: list[Instruction], exactly: tuple[int, int], exponentials: int = 0) -> list[Instruction]:
    """The shortest way from the entry to an exit on which a thread moves what the row makes it move.

    `exactly`: bytes of logits that it loads and stores (16 or more at a time); `exponentials`: how many it takes at least. That
    is the way of a peaked row: it skips what only kept tokens or infinities need. Counted loops run as often as they count,
    others as often as there is something to move. "Shortest" counts instructions. ValueError where no way does the work.
    """
    ranges = {first: end for first, end in blocks(code)}
    work = {first: _work(code[first:end]) for first, end in ranges.items()}
    lengths = {first: sum(x.name != "NOP" for x in code[first:end]) for first, end in ranges.items()}
    loops = list(counted_loops(code).items())
    start = (0, (0, 0), 0, (0,) * len(loops))
    best = {start: 0}
    came_from: dict[tuple, tuple] = {}
    queue = [(0, start)]
    while queue:
        cost, state = heapq.heappop(queue)
        first, moved, done, rounds = state
        if cost > best[state]:
            continue
        if first == len(code):
            if (moved, done) == (exactly, exponentials):
                return _walk(code, ranges, came_from, state)
            continue
        loads, stores, taken = work[first]
        moved = (moved[0] + loads, moved[1] + stores)
        done = min(done + taken, exponentials)
        if moved[0] > exactly[0] or moved[1] > exactly[1]:
            continue
        last = ranges[first] - 1
        for following in successors(code, last):
            after_rounds = _next_rounds(code, loops, rounds, last, following)
            after = (following, moved, done, after_rounds)
            if after_rounds is not None and cost + lengths[first] < best.get(after, math.inf):
                best[after] = cost + lengths[first]
                came_from[after] = state
                heapq.heappush(queue, (best[after], after))
    reached = sorted({state[1:3] for state in best if state[0] == len(code)})
    raise ValueError(
        f"no way loads and stores {exactly} bytes of a thread, 16 at a time, with at least {exponentials} exponentials; "
        f"others do {reached}"
    )


def _next_rounds(code: list, loops: list, rounds: tuple[int, ...], last: int, following: int) -> tuple[int, ...] | None:
    """The rounds of the counted loops after a step; None where it leaves a loop too early or goes round it once too often."""
    for number, (branch, count) in enumerate(loops):
        if last == branch:
            goes_round = following == code[branch].target
            if goes_round != (rounds[number] + 1 < count):
                return None
            return (*rounds[:number], rounds[number] + 1 if goes_round else 0, *rounds[number + 1 :])
    return rounds


def _work(code: list[Instruction]) -> tuple[int, int, int]:
    """(bytes of logits loaded, stored, exponentials) of a thread."""
    moves = [x for x in code if x.is_global]
    return (
        sum(x.width for x in moves if x.is_load and x.width >= WIDE),
        sum(x.width for x in moves if not x.is_load and x.width >= WIDE),
        sum(x.opcode.startswith("MUFU.EX2") for x in code),
    )


def _walk(code: list[Instruction], ranges: dict[int, int], came_from: dict, state: tuple) -> list[Instruction]:
    visited = []
    while state in came_from:
        state = came_from[state]
        visited.append(state[0])
    return [x for first in reversed(visited) for x in code[first : ranges[first]] if x.name != "NOP"]
