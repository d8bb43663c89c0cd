"""PTX text to a kernel: parameters, registers, shared memory, and instructions with their labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx.dtypes import NUMPY, Fault

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
LINE_DIRECTIVE = re.compile(r"^\s*\.(?:loc|file)\b[^\n]*$", re.M)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*((?:\.\w+\s+[\d,\s]+)*)\{")
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr[\s.\w]*\s)?\s*([\w$]+)(?:\[(\d+)\])?\s*$")
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;")
TOKEN = re.compile(r"\s*(?:(?P<label>[\w$]+)\s*:(?!:)|(?P<brace>[{}])|(?P<statement>[^;{}]*(?:\{[^{};]*\}[^;{}]*)*);)")
STATEMENT = re.compile(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)


@dataclass(frozen=True)
class Instruction:
    """One statement. `setp.lt.s32 %p1, %r1, 4` has the name `setp`, modifiers ("lt", "s32") and three operands."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    guard_negated: bool
    text: str


@dataclass
class Parameter:
    """A kernel's argument in the parameter space."""

    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """An entry of a PTX module."""

    name: str
    parameters: list[Parameter]
    threads: int | None  # what the launch must have, or may have at most
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name to PTX type
    shared: dict[str, int] = field(default_factory=dict)  # symbol to offset
    shared_bytes: int = 0


def entries(ptx: str) -> list[str]:
    """The names of a module's kernels."""
    return [match.group(1) for match in ENTRY.finditer(COMMENT.sub("", ptx))]


def parse(ptx: str, name: str | None = None) -> Kernel:
    """One kernel of a module, the first where no name is given.

    Raises:
        Fault: there is no such kernel, or a statement is no PTX that we know.
    """
    text = LINE_DIRECTIVE.sub("", COMMENT.sub("", ptx))
    entry = next((match for match in ENTRY.finditer(text) if name in (None, match.group(1))), None)
    if entry is None:
        raise Fault(f"no kernel {name or ''} in the PTX; it has {entries(ptx)}")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry.group(3))
    kernel = Kernel(entry.group(1), _parameters(entry.group(2)), int(threads.group(1)) if threads else None)
    for match in SHARED.finditer(text[: entry.start()]):
        _add_shared(kernel, match)
    _Body(kernel, text, entry.end()).read()
    return kernel


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for part in filter(str.strip, text.split(",")):
        match = PARAMETER.match(part.strip())
        if match is None:
            raise Fault(f"a parameter that we cannot read: {part.strip()}")
        size = int(match.group(3) or 1) * NUMPY[match.group(1)].itemsize
        offset = -(-offset // 16) * 16
        found.append(Parameter(match.group(2), offset, size))
        offset += size
    return found


def _add_shared(kernel: Kernel, match: re.Match) -> None:
    align, kind, symbol, count = match.groups()
    if symbol in kernel.shared:
        return
    element = NUMPY[kind].itemsize
    start = -(-kernel.shared_bytes // int(align or element)) * int(align or element)
    kernel.shared[symbol] = start
    kernel.shared_bytes = start + element * (1 if count is None else int(count or 0))


class _Body:
    """Reads the statements between a kernel's braces. A register that an inner block declares is another one."""

    def __init__(self, kernel: Kernel, text: str, start: int) -> None:
        self.kernel, self.text, self.at = kernel, text, start
        self.scopes: list[dict[str, str]] = [{}]
        self.inner = 0

    def read(self) -> None:
        while self.scopes:
            token = TOKEN.match(self.text, self.at)
            if token is None:
                raise Fault(f"{self.kernel.name}: PTX that we cannot read: {self.text[self.at : self.at + 80]!r}")
            self.at = token.end()
            if token["label"]:
                self.kernel.labels[token["label"]] = len(self.kernel.instructions)
            elif token["brace"] == "{":
                self.scopes.append({})
                self.inner += 1
            elif token["brace"] == "}":
                self.scopes.pop()
            else:
                self.statement(token["statement"].strip())

    def statement(self, text: str) -> None:
        if text.startswith("."):
            return self.directive(text)
        match = STATEMENT.match(text)
        if match is None:
            raise Fault(f"{self.kernel.name}: a statement that we cannot read: {text!r}")
        negated, guard, opcode, rest = match.groups()
        name, *modifiers = opcode.replace("shared::cta", "shared").split(".")
        operands = tuple(self.renamed(part) for part in split_operands(rest))
        line = re.sub(r"\s+", " ", text)
        guard = self.renamed(guard) if guard else None
        self.kernel.instructions.append(Instruction(name, tuple(modifiers), operands, guard, bool(negated), line))
        return None

    def directive(self, text: str) -> None:
        if shared := SHARED.match(text + ";"):
            return _add_shared(self.kernel, shared)
        if registers := REGISTERS.match(text):
            kind, names = registers.groups()
            for name in map(str.strip, names.split(",")):
                counted = re.match(r"(.*)<(\d+)>$", name)
                stems = [f"{counted.group(1)}{i}" for i in range(int(counted.group(2)))] if counted else [name]
                for stem in stems:
                    self.declare(stem, kind)
        elif not text.startswith(".pragma"):
            raise Fault(f"{self.kernel.name}: a directive that we do not know: {text!r}")
        return None

    def declare(self, name: str, kind: str) -> None:
        unique = name if len(self.scopes) == 1 else f"{name}@{self.inner}"
        self.scopes[-1][name] = unique
        self.kernel.registers[unique] = kind

    def renamed(self, text: str) -> str:
        if len(self.scopes) == 1:
            return text

        def unique(match: re.Match) -> str:
            return next((s[match.group()] for s in reversed(self.scopes) if match.group() in s), match.group())

        return re.sub(r"%?[\w$]+", unique, text)


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]
