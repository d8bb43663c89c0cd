"""Read the machine code of a cubin: the instructions of each kernel, with their control codes.

The disassembler prints each instruction with its 128 bits. The upper ones are the control codes, by which the hardware issues:

    bits 105-108   stall: clocks until the warp may issue its next instruction
    bits 110-112   the scoreboard that is released when the result is there (7: none)
    bits 113-115   the scoreboard that is released when the operands are read (7: none)
    bits 116-121   the scoreboards that the instruction waits for, one bit each

(Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826.)
"""

from __future__ import annotations

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
SINGLE = 2
"""Bytes of a load of one bfloat16 logit, of a kept token."""
PIPES = {
    "alu": (
        "BMSK CS2R F2FP FCHK FMNMX FMNMX3 FSEL FSET FSETP FSWZADD HMNMX2 VHMNMX I2FP I2IP IABS IADD IADD3 IADD64 IDP "
        "IMNMX ISCADD ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX "
        "VIMNMX VIMNMX3 VOTE"
    ),
    "fma": "FADD FADD2 FFMA FFMA2 FHADD FMUL FMUL2",
    # The half of the FMA pipe that also has integers and float16.
    "heavy": "HADD2 HFMA2 HMUL2 HSET2 HSETP2 IMAD",
    "xu": "BREV F2F F2I FLO FRND I2F I2I MUFU POPC",
    "lsu": (
        "ATOM ATOMG ATOMS CCTL CGAERRBAR CREDUX ERRBAR FENCE LD LDC LDG LDGSTS LDL LDS LDSM MATCH MEMBAR R2UR RED REDG REDUX "
        "S2R S2UR SHFL ST STAS STG STL STS STSM UCGABAR_ARV UCGABAR_WAIT"
    ),
    "uniform": (
        "LDCU R2B UFADD UFFMA UFLO UFMNMX UFMUL UFSEL UFSETP UI2FP UIADD3 UIMAD UISETP ULDC ULEA ULOP3 UMOV "
        "UP2UR UPLOP3 UPOPC UPRMT USEL USGXT USHF VOTEU"
    ),
    "control": (
        "ACQBULK BAR BPT BRA BREAK BRX BSSY BSYNC CALL DEPBAR ENDCOLLECTIVE EXIT KILL NANOSLEEP NOP PREEXIT RET WARPSYNC YIELD"
    ),
}
"""The pipe that executes an opcode on sm_80 to sm_100, after the throughput table of the CUDA C++ Programming Guide.

("Arithmetic Instructions"; where it gives none, the pipe of the nearest instruction is assumed.)"""
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
    """One instruction: its guard ("" or "!P0"), opcode with suffixes, operands, control codes, and the index of its target."""

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
        """Whether a branch or an exit can go either way."""
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
