"""A driver of Triton's that compiles for a GPU which is not there and runs the PTX on CPU tensors.

The kernels' host code is unchanged. Compilation ends at the PTX: no ptxas, no cubin. Works with triton 3.6 to 3.9.
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from ptx.dtypes import Fault
from ptx.machine import ORDERS, Machine
from ptx.memory import Memory

FORMATS = {"fp32": "<f", "f32": "<f", "fp64": "<d", "f64": "<d"}
PROPERTIES = {
    "max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
    "sm_clock_rate": 1755000, "mem_clock_rate": 2619000, "mem_bus_width": 5120,
}  # fmt: skip
"""An H100's. No kernel of ours asks for more than a few of them."""


@dataclass
class Cost:
    """What the launches of one kernel cost, in seconds of the processor."""

    launches: int = 0
    thread_instructions: int = 0
    seconds: float = 0.0


COSTS: dict[str, Cost] = {}
"""By kernel, since the driver was installed."""


class PtxBackend(CUDABackend):
    """NVIDIA's compiler without its last stage."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return f"{super().hash()}-ptx"


class Utils:
    """What Triton asks a driver's library for."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spilled bytes, most threads of a block)."""
        return kernel, kernel, 64, 0, 1024

    def unload_module(self, module: bytes) -> None:
        """There is none."""


class Launcher:
    """Launches one compiled kernel."""

    perturb, seed = 0.0, 0
    order: str = "forward"
    """Of the programs, one of ORDERS."""
    at_once: int | None = None
    """How many programs run together; as many as fit if None."""

    def __init__(self, src, metadata) -> None:
        self.types = tuple(src.signature.values())
        self.metadata = metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments) -> None:
        """Run it; the arguments are those of the Python function, constants too."""
        if x * y * z == 0:
            return
        meta = self.metadata
        machine = prepared(function, meta.enable_fp_fusion, self.perturb, self.seed, meta.shared)
        cost = COSTS.setdefault(machine.kernel.name, Cost())
        start = time.process_time()
        memory, parameters = Memory(), []
        for value, kind in flat(arguments, self.types):
            parameters.append(packed_argument(value, kind, memory))
        for parameter in machine.kernel.parameters[len(parameters) :]:  # Triton's scratch, which no kernel of ours uses
            parameters.append(bytes(parameter.size))
        order = ORDERS[self.order](x * y * z)
        launched = machine.launch(
            (x, y, z), parameters, memory, threads=32 * meta.num_warps, order=order, at_once=self.at_once
        )
        cost.launches += 1
        cost.thread_instructions += launched.thread_instructions
        cost.seconds += time.process_time() - start


@functools.lru_cache(maxsize=512)
def prepared(ptx: bytes | str, contract: bool, perturb: float, seed: int, shared: int) -> Machine:
    """A kernel's machine, prepared once."""
    text = ptx.decode() if isinstance(ptx, bytes) else ptx
    return Machine(text, contract=contract, perturb=perturb, seed=seed, shared_bytes=shared)


def flat(values, types) -> Iterator[tuple[object, str]]:
    """(value, type) of what the kernel gets: tuples opened, constants left out."""
    for value, kind in zip(values, types, strict=True):
        if isinstance(kind, tuple):
            yield from flat(value, kind)
        elif kind != "constexpr":
            yield value, kind


def packed_argument(value, kind: str, memory: Memory) -> bytes:
    """The bytes of one argument; a tensor's storage becomes memory that the kernel may touch."""
    if kind.startswith("*"):
        if value is None:
            return bytes(8)
        if value.device.type != "cpu":
            raise Fault(f"a tensor on {value.device}")
        memory.add_tensor(value)
        return struct.pack("<Q", value.data_ptr())
    if kind in FORMATS:
        return struct.pack(FORMATS[kind], value)
    size = 4 if kind in ("i1", "i8", "i16", "u1", "u8", "u16") else int(kind[1:]) // 8
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


class PtxDriver(DriverBase):
    """The active driver of Triton while tests run on PTX."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.utils, self.launcher_cls = Utils(), Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.target, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> None:
        """Nothing is timed here."""

    def get_device_interface(self):
        return torch.cuda


def install(target: int, perturb: float = 0.0, seed: int = 0) -> None:
    """Make Triton compile for `sm_<target>` and run what it makes here. Before the first kernel is decorated."""
    backends = triton.backends.backends
    backends["nvidia"] = replace(backends["nvidia"], compiler=PtxBackend)
    Launcher.perturb, Launcher.seed = perturb, seed
    triton.runtime.driver.set_active(PtxDriver(target))
