"""Builds the CUDA kernels for the host (csrc/emulation/) with g++, once for each state of the sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = ["bindings.cpp", "devices.cpp", *(f"cuda/{path.name}" for path in sorted((CSRC / "cuda").glob("*.cu")))]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
DEFINES = [
    "TORCH_TARGET_VERSION=0x020b000000000000",
    "SVDECODE_NAMESPACE=svdecode_emulated",
    "SVDECODE_EMULATION",
    'SVDECODE_SOURCES="emulated"',
]
DEFINES += ["SVDECODE_CUDA"]


def build(csrc: Path = CSRC, folder: Path = ROOT / "build" / "emulation") -> Path | None:
    """The library's path, None without g++. `csrc` may be an altered copy."""
    if shutil.which("g++") is None:
        return None
    text = b"".join(path.read_bytes() for path in sorted(csrc.rglob("*")) if path.is_file())
    library = folder / f"emulated-{hashlib.sha256(text + torch.__version__.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    home = Path(torch.__file__).parent
    defines = [f"-D{define}" for define in DEFINES]
    processes, objects = [], []
    for source in SOURCES:
        objects.append(folder / f"{library.stem}-{Path(source).name}.o")
        command = ["g++", *FLAGS, *defines, f"-I{home / 'include'}", "-x", "c++", "-c", str(csrc / source)]
        processes.append(subprocess.Popen([*command, "-o", str(objects[-1])]))
    if any(process.wait() for process in processes):
        raise RuntimeError("the emulation of the CUDA kernels does not compile")
    partial = library.with_suffix(f".{os.getpid()}")
    link = ["g++", "-shared", "-o", str(partial), *map(str, objects), f"-L{home / 'lib'}", "-ltorch_cpu"]
    subprocess.run(link, check=True)
    partial.rename(library)
    return library
