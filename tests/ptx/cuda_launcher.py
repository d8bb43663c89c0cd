"""Runs the PTX that nvcc makes of csrc/cuda/*.cu, with the operators' own host code.

nvcc compiles the sources and links their host part with `cuda_runtime.cpp` instead of the CUDA runtime. Each launch of the host
code comes here: the kernel's name in the PTX, the grid and the arguments as they are in memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from ptx.dtypes import Fault
from ptx.machine import ORDERS, Machine
from ptx.memory import Memory
from ptx.program import entries

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_missing() -> str | None:
    """What this machine lacks to compile the kernels, or None."""
    return next((f"{tool} is not found" for tool in ("nvcc", "g++") if shutil.which(tool) is None), None)


def build(csrc: Path = CSRC, target: int = 90, folder: Path = ROOT / "build" / "ptx") -> tuple[Path, list[Path]]:
    """(the library of the host code, the PTX files), made once for each state of the sources."""
    runtime = Path(__file__).with_name("cuda_runtime.cpp")
    sources = sorted((csrc / "cuda").glob("*.cu"))
    read = [path for path in sorted(csrc.rglob("*")) if path.suffix in (".h", ".cu")]
    digest = hashlib.sha256(
        b"".join(path.read_bytes() for path in [runtime, *read]) + bytes([target]) + b"--fmad=false"
    ).hexdigest()[:16]
    done = folder / digest
    if not done.exists():
        work = folder / f"{digest}.{os.getpid()}"
        work.mkdir(parents=True)
        # code=compute_90: the PTX goes into the object as it is, ptxas does not run; --keep leaves it in the folder too
        flags = [
            "-std=c++17",
            "--fmad=false",  # as setup.py: with contraction, copies of one formula differ and a token is found twice
            f"-gencode=arch=compute_{target},code=compute_{target}",
            f"-I{csrc}",
            "-Xcompiler",
            "-fPIC",
        ]
        compilers = [subprocess.Popen(["nvcc", *flags, "-c", str(path), "--keep"], cwd=work) for path in sources]
        if any(compiler.wait() for compiler in compilers):
            raise RuntimeError("nvcc does not compile csrc/cuda")
        objects = [f"{path.stem}.o" for path in sources]
        link = [
            "nvcc",
            "-std=c++17",
            "-shared",
            "-cudart",
            "none",
            "-Xcompiler",
            "-fPIC",
            f"-I{csrc}",
            str(runtime),
            *objects,
        ]
        subprocess.run([*link, "-o", "host.so"], cwd=work, check=True)
        try:
            work.rename(done)
        except OSError:  # another process has built the same in the meantime
            shutil.rmtree(work)
    return done / "host.so", sorted(done / f"{path.stem}.ptx" for path in sources)


class _Input(ctypes.Structure):
    """`Input` of cuda_runtime.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pre", "ft")),
        *((name, ctypes.c_int32) for name in ("pre_dtype", "ft_dtype", "vocabulary")),
        *((name, ctypes.c_int64) for name in ("rows", "pre_stride", "ft_stride")),
        *((name, ctypes.c_float) for name in ("log_alpha", "penalty")),
        ("kl_direction", ctypes.c_int32),
    ]


_LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)


class CudaOperators:
    """The operators of csrc/cuda on CPU tensors of shape (rows, V)."""

    def __init__(self, library: Path, modules: list[Path], contract: bool = True, perturb: float = 0.0) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.scratch_bytes.restype = ctypes.c_size_t
        self._callback = _LAUNCH(self._launch)
        texts = [path.read_text() for path in modules]
        self._text_of = {name: text for text in texts for name in entries(text)}
        self._machines: dict[str, Machine] = {}
        self._options = {"contract": contract, "perturb": perturb}
        self.order, self.at_once = "forward", None
        self.launched: list[str] = []
        self._memory, self._fault = Memory(), None

    def _launch(self, name: bytes, grid, threads: int, arguments, shared: int) -> None:
        """An exception cannot pass through the C++ code above; it waits for the operator's end."""
        if self._fault is not None:
            return
        try:
            kernel = name.decode()
            if kernel not in self._machines:
                self._machines[kernel] = Machine(self._text_of[kernel], kernel, shared_bytes=shared, **self._options)
            machine = self._machines[kernel]
            sizes = [parameter.size for parameter in machine.kernel.parameters]
            parameters = [ctypes.string_at(arguments[n], size) for n, size in enumerate(sizes)]
            size = tuple(grid[n] for n in range(3))
            order = ORDERS[self.order](math.prod(size))
            machine.launch(size, parameters, self._memory, threads=threads, order=order, at_once=self.at_once)
            self.launched.append(kernel)
        except Exception as fault:
            self._fault = fault

    def _call(self, name: str, pre: Tensor, ft: Tensor, settings: dict, *arguments) -> None:
        alpha, penalty = settings.get("alpha", 0.1), settings.get("penalty", -math.inf)
        given = _Input(
            pre.data_ptr(), ft.data_ptr(), DTYPES[pre.dtype], DTYPES[ft.dtype], ft.shape[1], ft.shape[0], pre.stride(0),
            ft.stride(0), math.log(alpha) if alpha > 0 else -math.inf, penalty, settings.get("direction", "kl") == "kl",
        )  # fmt: skip
        scratch = torch.full((-(-self.library.scratch_bytes(ctypes.byref(given)) // 4),), 0x7FBADBAD, dtype=torch.int32)
        self._memory, self._fault = Memory(), None
        for tensor in (pre, ft, scratch, *(x for x in arguments if isinstance(x, Tensor))):
            self._memory.add_tensor(tensor)
        self.library.on_launch(self._callback)  # here, since all operators of a process share the library
        values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
        getattr(self.library, name)(ctypes.byref(given), ctypes.c_void_p(scratch.data_ptr()), *values)
        if self._fault is not None:
            raise Fault(str(self._fault)) from self._fault

    def fused_steer(
        self, pre: Tensor, ft: Tensor, mu: float, labels: Tensor | None = None, **settings
    ) -> dict[str, Tensor]:
        """With labels each row's own strength, and its moments."""
        rows, vocabulary = ft.shape
        out = {"logprobs": torch.empty(rows, vocabulary), "mu": torch.empty(rows)}
        out |= {"num_kept": torch.empty(rows, dtype=torch.int32), "kl": torch.empty(rows)}
        out |= {"mu_star": torch.empty(rows), "moments": torch.empty(rows, 3)} if labels is not None else {}
        found = [out.get(name) for name in ("logprobs", "mu", "num_kept", "kl", "mu_star", "moments")]
        self._call("fused_steer", pre, ft, settings, ctypes.c_float(mu), labels, *found)
        return out

    def steer_sample(
        self,
        pre: Tensor,
        ft: Tensor,
        mu: float,
        uniform: Tensor,
        temperature: float,
        top_k: int,
        top_p: float,
        **settings,
    ) -> tuple[Tensor, Tensor]:
        """(tokens, log-probs)."""
        tokens, logprobs = torch.empty(len(ft), dtype=torch.int64), torch.empty(len(ft))
        numbers = ctypes.c_float(temperature), ctypes.c_int64(top_k), ctypes.c_float(top_p)
        self._call("steer_sample", pre, ft, settings, ctypes.c_float(mu), uniform, *numbers, tokens, logprobs)
        return tokens, logprobs

    def steer_topk(self, pre: Tensor, ft: Tensor, mu: float, k: int, **settings) -> tuple[Tensor, Tensor]:
        """(tokens, log-probs), both (rows, k)."""
        tokens, logprobs = torch.empty(len(ft), k, dtype=torch.int64), torch.empty(len(ft), k)
        self._call("steer_topk", pre, ft, settings, ctypes.c_float(mu), ctypes.c_int64(k), tokens, logprobs)
        return tokens, logprobs
