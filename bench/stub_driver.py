"""A Triton driver without a GPU: kernels are compiled for sm_90, loading one does nothing, and launching one only notes it.

What is left of a call is its Python, which is what `overhead.py` measures; the tests see in `launches` what would have started.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Launch(NamedTuple):
    """What reached the launcher of a compiled kernel: `source` and `metadata` say for what it was compiled."""

    source: object
    metadata: object
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple


class StubDriver(DriverBase):
    """As `triton.runtime.driver.active`; `device` and `stream` are the current ones, of each thread."""

    def __init__(self) -> None:
        self.launches: list[Launch] | None = None
        """Filled where a list is put here."""
        self.utils = self
        self.current = threading.local()

    def launcher_cls(self, source, metadata):
        """The launcher of a compiled kernel, as Triton asks for it."""

        def launcher(x, y, z, stream, _function, _packed, _launch_metadata, _enter_hook, _exit_hook, *arguments):
            if self.launches is not None:
                self.launches.append(Launch(source, metadata, (x, y, z), stream, arguments))

        return launcher

    def get_current_device(self) -> int:
        """Index of the current device."""
        return getattr(self.current, "device", 0)

    def get_current_stream(self, _device: int) -> int:
        """Handle of the current stream."""
        return getattr(self.current, "stream", 0)

    def get_device_properties(self, _device: int) -> dict[str, int]:
        """What Triton asks of an H100 before it loads a kernel."""
        return {"max_shared_mem": 232_448}

    def load_binary(self, *_arguments) -> tuple[None, int, int, int, int]:
        """(module, function, registers, spilled bytes, most threads in a block); no module, so none is unloaded."""
        return None, 1, 64, 0, 1024

    def get_current_target(self) -> GPUTarget:
        """sm_90."""
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def is_active() -> bool:
        """Only where it is set by hand."""
        return False

    def get_active_torch_device(self) -> torch.device:
        """Tensors lie in the memory of the host."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Not used: no launcher is compiled."""
        return ty

    def get_benchmarker(self):
        """Not used."""
        return None
