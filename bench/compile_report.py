"""Compile every Triton kernel offline, no GPU needed, and print what the compiler made of it.

    python bench/compile_report.py [--json]

One row a kernel, variant, pair of dtypes and target: registers a thread, spilled bytes, shared memory, and the widths of the
loads from global memory in bytes (16 is the widest), read from the compiler's own artefacts (ptxas through the cubin, and PTX).
"""

from __future__ import annotations

import argparse
import collections
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what the kernels run with; unset, triton 3.9 warns
os.environ.pop("TRITON_INTERPRET", None)  # kernels decorated under it cannot be compiled

import torch  # noqa: F401  (before triton, which looks for it)
import triton
from machine_code import find_tool
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 90, 100, 120)
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
INTEGER_POINTERS = {"label_ptr": "*i64", "count_out_ptr": "*i32", "token_out_ptr": "*i64"}
FLOATS = ("mu_number", "log_alpha", "penalty", "eps", "inverse_temperature", "top_p")
LOAD = re.compile(r"ld\.global(?:\.[a-zA-Z0-9_:]+)*?(?:\.v(\d))?\.[bufs](\d+)\b")


class Named(NamedTuple):
    """A kernel with values for all its constexpr parameters; LANES is None until the dtypes are known."""

    kernel: object
    name: str
    constants: dict[str, object]
    tensors: int


def variants() -> list[Named]:
    """Every variant that `KERNEL_VARIANTS` of a module in `svdecode.kernels` lists, at a vocabulary of 128,256."""
    found = []
    folder = Path(importlib.import_module("svdecode.kernels").__file__).parent
    for path in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"svdecode.kernels.{path.stem}")
        for kernel, flags, tensors in getattr(module, "KERNEL_VARIANTS", ()):
            for values in itertools.product(*flags.values()):
                constants = dict(zip(flags, values, strict=True))
                label = ",".join(f"{k.lower()}={text_of(v)}" for k, v in constants.items() if len(flags[k]) > 1)
                found.append(Named(kernel, f"{kernel.fn.__name__}[{label}]", constants, tensors))
    return found


def text_of(value: object) -> str:
    """A constant's value in the name of a variant."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _is_aligned(variant: Named) -> bool:
    """Whether rows begin where loads of 16 bytes may; a kernel without the constant has no rows."""
    return variant.constants.get("ALIGN") != 1


def lanes_of(variant: Named, pre: str, ft: str) -> int:
    """Tokens that a load of a warp covers: one for each thread where rows begin anywhere."""
    from svdecode.kernels.settings import LOAD_BYTES, WARP_THREADS

    return WARP_THREADS * (LOAD_BYTES // max(BYTES[pre], BYTES[ft]) if _is_aligned(variant) else 1)


def signature(variant: Named, pre: str, ft: str, levels: bool) -> tuple[dict, dict, dict]:
    """Types of all arguments by their names, constants, and which arguments are divisible by 16, as contiguous logits are.

    `levels`: rows on three levels; else on one, as of an ordinary batch, whose other sizes, 1, Triton takes for constants.
    """
    types, aligned = {}, {}
    values = dict(variant.constants)
    if "LANES" in values:
        values["LANES"] = lanes_of(variant, pre, ft)
    constants = {(variant.kernel.arg_names.index(name),): value for name, value in values.items()}
    divisible = [["tt.divisibility", 16]]
    for index, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            types[name] = "constexpr"
        elif name == "layout":
            types[name] = (
                ("i32",) * 2 if levels else ("constexpr",) * 2,
                *(("i32",) * 3 for _ in range(variant.tensors)),
            )
            if not levels:
                constants |= {(index, 0, 0): 1, (index, 0, 1): 1}
            if _is_aligned(variant):
                aligned |= {(index, 1 + t, level): divisible for t in range(variant.tensors) for level in range(3)}
        elif name.endswith("_ptr"):
            logits = {"pre_ptr": pre, "ft_ptr": ft, "pre_grad_out_ptr": pre, "ft_grad_out_ptr": ft}
            types[name] = POINTERS[logits[name]] if name in logits else INTEGER_POINTERS.get(name, "*fp32")
            aligned[(index,)] = divisible
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    return types, constants, aligned


def resources(cubin: bytes) -> dict[str, dict[str, int]]:
    """Registers, spilled (local) bytes and shared bytes of each kernel as cuobjdump reads them off the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_tool("cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", text):
        usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        found[name] = {
            "registers": usage["REG"],
            "spilled": usage["LOCAL"] + usage["STACK"],
            "shared": usage["SHARED"],
        }
    return found


def build(variant: Named, pre: str, ft: str, target: int, levels: bool = False) -> object:
    """What triton makes of one variant for `sm_<target>`: its `asm` has the PTX and the cubin, its `metadata` the launch."""
    from svdecode.kernels.settings import LAUNCH, stream_launch

    types, constants, aligned = signature(variant, pre, ft, levels)
    source = ASTSource(fn=variant.kernel, signature=types, constexprs=constants, attrs=aligned)
    streams = "LANES" in variant.constants
    options = stream_launch(lanes_of(variant, pre, ft)) if streams else LAUNCH
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def compile_one(variant: Named, pre: str, ft: str, target: int, levels: bool = False) -> dict[str, object]:
    """Compile one variant and read the numbers off it."""
    compiled = build(variant, pre, ft, target, levels)
    widths = collections.Counter(int(v or 1) * int(bits) // 8 for v, bits in LOAD.findall(compiled.asm["ptx"]))
    (usage,) = resources(compiled.asm["cubin"]).values()
    return {
        "kernel": variant.name,
        "dtypes": f"{pre}/{ft}",
        "target": f"sm_{target}",
        **usage,
        "shared": max(usage["shared"], compiled.metadata.shared),
        "loads": {str(width): count for width, count in sorted(widths.items(), reverse=True)},
    }


def main() -> None:
    """Compile all and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument("--targets", type=int, nargs="*", default=TARGETS)
    parser.add_argument("--levels", action="store_true", help="rows of strided tensors, on three levels")
    parser.add_argument("--dtypes", nargs="*", default=["bf16/bf16", "fp32/fp32", "bf16/fp32"])
    arguments = parser.parse_args()
    jobs = list(itertools.product(variants(), arguments.dtypes, arguments.targets))
    rows = []
    for index, (variant, dtypes, target) in enumerate(jobs):
        rows.append(compile_one(variant, *dtypes.split("/"), target, arguments.levels))
        print(f"\r{index + 1}/{len(jobs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| kernel | pre/ft | target | registers | spilled | shared | loads (bytes x count) |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        loads = ", ".join(f"{w} x {n}" for w, n in row["loads"].items())
        print("| {kernel} | {dtypes} | {target} | {registers} | {spilled} | {shared} | ".format(**row) + f"{loads} |")


if __name__ == "__main__":
    main()
