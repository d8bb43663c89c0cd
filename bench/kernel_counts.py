"""Compile the kernels and count what is in their machine code, per token, on the way that a peaked row takes. No GPU needed."""

from __future__ import annotations

import collections
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import compile_report
from kernel_work import CUDA_STREAMS, CUDA_WARPS, STREAMS, Work
from machine_code import Instruction, demangle, disassemble
from processor import WARP, Program
from ways import first_wide_load, loads_before_first_wait, path

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
BFLOAT16 = 1
COUNTED_PIPES = {"alu": ("alu",), "fma": ("fma", "heavy"), "xu": ("xu",), "lsu": ("lsu",)}


class Kernel(NamedTuple):
    """A compiled kernel: its machine code, its use of registers (per thread) and memory (bytes), and its warps."""

    code: list[Instruction]
    usage: dict[str, int]
    warps: int

    def program(self, work: Work) -> Program:
        """What a program of it executes for some work."""
        per_thread = work.tokens / (self.warps * WARP)
        moved = (int(work.read * per_thread), int(work.written * per_thread))
        least = (int(work.exponentials * per_thread), int(work.singles * per_thread))
        way = path(self.code, moved, *least, work.straight)
        return Program(way, self.warps, self.usage["registers"], self.usage["shared"])


@functools.cache
def variants() -> list[compile_report.Named]:
    """All variants of the Triton kernels."""
    return compile_report.variants()


def unaligned() -> list[compile_report.Named]:
    """The first launch with KL where V is not a multiple of 8, so that rows begin anywhere; without and with the fill."""
    name = "row_statistics_kernel"
    known = [variant.constants for variant in variants() if variant.kernel.fn.__name__ == name]
    fills = [constants["FILL"] for constants in known if constants["WITH_KL"]]
    return [find_variant(name, {"ALIGN": 1, "WITH_KL": True, "FILL": fill}) for fill in fills]


def find_variant(kernel: str, constants: dict[str, object]) -> compile_report.Named:
    """The first variant of a kernel, with some of its constants replaced."""
    known = next(variant for variant in variants() if variant.kernel.fn.__name__ == kernel)
    unknown = set(constants) - set(known.constants)
    if unknown:
        raise ValueError(f"{kernel} has no constants {sorted(unknown)}")
    label = ",".join(f"{key.lower()}={compile_report.text_of(value)}" for key, value in constants.items())
    return known._replace(name=f"{kernel}[{label}]", constants={**known.constants, **constants})


def read_kernel(compiled: object) -> Kernel:
    """The machine code of what triton compiled."""
    cubin = compiled.asm["cubin"]
    (code,), (usage,) = disassemble(cubin).values(), compile_report.resources(cubin).values()
    shared = max(usage["shared"], compiled.metadata.shared)
    return Kernel(code, {**usage, "shared": shared}, compiled.metadata.num_warps)


def compile_triton(variant: compile_report.Named, target: int) -> Kernel:
    """Compile a Triton kernel for bfloat16 inputs."""
    return read_kernel(compile_report.build(variant, "bf16", "bf16", target))


@functools.cache
def compile_cuda(source: str, target: int) -> dict[str, Kernel]:
    """The kernels of a file in csrc/cuda by their demangled names, compiled as setup.py does."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [
            "nvcc",
            "-cubin",
            "-O3",
            "--fmad=false",
            "-std=c++17",
            f"-arch=sm_{target}",
            "-o",
            str(cubin),
            str(CUDA_SOURCES / source),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
        content = cubin.read_bytes()
    used = compile_report.resources(content)
    usage = dict(zip(demangle(list(used)), used.values(), strict=True))
    return {name: Kernel(code, usage[name], CUDA_WARPS) for name, code in disassemble(content).items()}


def find_cuda(source: str, name: str, target: int) -> Kernel:
    """The kernel whose demangled name has `name`, for bfloat16 inputs where the type is a parameter of the template."""
    found = {full: kernel for full, kernel in compile_cuda(source, target).items() if re.search(rf"\b{name}\b", full)}
    if len(found) > 1:
        found = {full: kernel for full, kernel in found.items() if bfloat16_only(full)}
    if len(found) != 1:
        raise ValueError(
            f"{source} has {len(found)} kernels {name!r} for bfloat16: {list(compile_cuda(source, target))}"
        )
    return next(iter(found.values()))


def bfloat16_only(name: str) -> bool:
    """Whether a demangled name is that of the instance for bfloat16 (`Dtype` in csrc/arguments.h)."""
    return f"_kernel<{BFLOAT16}>" in name


def count(kernel: Kernel, work: Work) -> dict[str, object]:
    """The counts of a kernel on the way that does `work`."""
    way = kernel.program(work).path
    threads = kernel.warps * WARP
    pipes = collections.Counter(x.pipe for x in way)
    names = collections.Counter(x.name for x in way)
    moves = [x for x in way if x.is_global]

    def widths(load: bool) -> dict[str, int]:
        found = collections.Counter(x.width for x in moves if x.is_load == load)
        return {str(width): number for width, number in sorted(found.items(), reverse=True)}

    return {
        "instructions": len(way) * threads / work.tokens,
        **{name: sum(pipes[p] for p in of) * threads / work.tokens for name, of in COUNTED_PIPES.items()},
        "barriers": sum(x.opcode.startswith("BAR.SYNC") for x in way),
        "shuffles": names["SHFL"],
        "registers": kernel.usage["registers"],
        "spilled": kernel.usage["spilled"],
        "loads": widths(True),
        "stores": widths(False),
        "before_first_load": first_wide_load(way),
        "loads_before_first_wait": loads_before_first_wait(way),
    }


def is_wanted(name: str, only: list[str] | None) -> bool:
    """Whether a name begins as one of `only`, which is None where all are wanted."""
    return only is None or any(name.startswith(beginning) for beginning in only)


def triton_counts(only: list[str] | None, target: int = 90) -> list[dict[str, object]]:
    """One row for each streaming variant; `only`: those whose names begin so."""
    rows = []
    for variant in variants() + unaligned():
        name = variant.kernel.fn.__name__
        work = STREAMS[name](variant.constants) if name in STREAMS and is_wanted(variant.name, only) else None
        if work is not None:
            counted = count(compile_triton(variant, target), work)
            rows.append({"kernel": variant.name, "constants": variant.constants, **counted})
    return rows


def cuda_counts(only: list[str] | None, target: int = 90) -> list[dict[str, object]]:
    """One row for each streaming CUDA kernel; none where nvcc is missing."""
    if shutil.which("nvcc") is None:
        return []
    return [
        {"kernel": label, **count(find_cuda(source, name, target), work)}
        for label, (source, name, work) in CUDA_STREAMS.items()
        if is_wanted(label, only)
    ]
