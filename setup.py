"""Build script: the metadata is in pyproject.toml; whether and how the compiled operators are built is here.

SVDECODE_BUILD: left out, the C++ operators are built where there is a compiler, and the CUDA kernels where torch is a CUDA
build and nvcc is found; whatever is missing is left out, with a word. "none" builds nothing, "cpu" the C++ operators or
fails, "cuda" both or fails. torch is looked for in the interpreter that will run the package, also inside pip's isolated
build environment; it is not imported, and nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

WANTED = os.environ.get("SVDECODE_BUILD", "")
if WANTED not in ("", "none", "cpu", "cuda"):
    raise SystemExit(f"svdecode: SVDECODE_BUILD must be none, cpu or cuda, or left out, got {WANTED!r}")
CSRC = Path("csrc")
CPP = ["bindings.cpp", "devices.cpp", "cpu/base.cpp", "cpu/avx2.cpp", "cpu/avx512.cpp"]
CUDA = sorted((CSRC / "cuda").glob("*.cu"))
COMPILE = ["-std=c++17", "-O3", "-funroll-loops", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
COMPILE += ["-fvisibility=hidden", "-g0", "-fno-wrapv"]  # Python's own -fwrapv made the loops 22% slower
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")  # torch 2.11
ARCHITECTURES = (80, 90, 100, 120)


def sources() -> str:
    """The digest of csrc/ as svdecode computes it; the package itself cannot be imported without torch."""
    spec = importlib.util.spec_from_file_location("sources_digest", "svdecode/ops/sources_digest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.sources_digest(CSRC)


def torch_folder() -> Path | None:
    """The installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    # pip hides the environment's packages from an isolated build; the folder is still theirs.
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    return next((folder for folder in folders if (folder / "include/torch/csrc/stable/library.h").exists()), None)


def torch_has_cuda(torch: Path) -> bool:
    """Whether torch is a CUDA build, as its version.py says."""
    return re.search(r"^cuda\b.*=\s*['\"]", (torch / "version.py").read_text(), re.MULTILINE) is not None


def nvcc() -> Path | None:
    """The CUDA compiler of CUDA_HOME, or on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None) or shutil.which("nvcc")
    return Path(found).resolve() if found else None


def cudart_folders(compiler: Path) -> list[str]:
    """Where nvcc's static runtime is; nvcc may be a script somewhere else, so it is asked for its toolkit."""
    command = [str(compiler), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    home = Path(top.group(1).strip()) if top else compiler.parent.parent
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    return [str(folder) for folder in folders if (folder / "libcudart_static.a").exists()]


def why_not_cpp(torch: Path | None) -> str | None:
    """What the C++ operators lack, or None."""
    if WANTED == "none":
        return "SVDECODE_BUILD=none"
    if torch is None:
        return (
            "torch was not there when svdecode was installed: install torch >= 2.11 first, then svdecode again, with "
            "pip install --force-reinstall --no-deps"
        )
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    return None if shutil.which(compiler) else f"there was no C++ compiler ({compiler})"


def why_not_cuda(torch: Path) -> str | None:
    """What the CUDA kernels lack, or None."""
    if WANTED == "cpu":
        return "SVDECODE_BUILD=cpu"
    if nvcc() is None:
        return "nvcc is not found (PATH, CUDA_HOME)"
    return None if WANTED == "cuda" or torch_has_cuda(torch) else "torch is built without CUDA"


class BuildOperators(build_ext):
    """The C++ sources by the usual way; before, the CUDA sources into objects by nvcc."""

    def build_extension(self, ext: Extension) -> None:
        """Build, or without SVDECODE_BUILD go on where that fails: the package works without."""
        try:
            if ext.cuda:
                self.compile_cuda(ext)
            super().build_extension(ext)
        except Exception as error:
            if WANTED:
                raise
            say(f"building the compiled operators failed, svdecode works without them: {error}")
            record(self.build_lib, f"building them failed ({error})")

    def compile_cuda(self, ext: Extension) -> None:
        """Objects of the .cu files, which do not include torch, for all architectures, with PTX for later ones."""
        compiler = nvcc()
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        targets.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        for source in CUDA:
            target = folder / f"{source.stem}.o"
            # Contraction to fma loses the digits that csrc/row_algebra.h keeps; where it serves, it is written out.
            flags = [
                "-std=c++17",
                "-O3",
                "--fmad=false",
                "--threads=4",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "-cudart=static",
            ]
            subprocess.run([str(compiler), *flags, *targets, "-c", str(source), "-o", str(target)], check=True)
            ext.extra_objects.append(str(target))
        ext.define_macros.append(("SVDECODE_CUDA", "1"))
        ext.library_dirs += cudart_folders(compiler)
        ext.libraries += ["cudart_static", "rt", "pthread"]


class BuildPython(build_py):
    """The Python files by the usual way; and why there are no compiled operators, for `svdecode info`."""

    def run(self) -> None:
        """Build."""
        super().run()
        if not modules:
            record("." if self.editable_mode else self.build_lib, why_not_cpp(torch_folder()))


def record(folder: str, reason: str) -> None:
    """Leave the reason why there are no compiled operators beside the code that looks for them."""
    path = Path(folder) / "svdecode" / "ops" / "not_compiled.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reason)


def say(text: str) -> None:
    """A line that pip shows with -v."""
    print(f"svdecode: {text}", file=sys.stderr)


def extensions() -> list[Extension]:
    """The compiled operators, if they can be built here."""
    torch = torch_folder()
    why = why_not_cpp(torch)
    why_cuda = why or why_not_cuda(torch)
    if why:
        say(f"without the compiled operators: {why}")
    elif why_cuda:
        say(f"without the CUDA kernels: {why_cuda}")
    if (WANTED in ("cpu", "cuda") and why) or (WANTED == "cuda" and why_cuda):
        raise SystemExit(f"svdecode: SVDECODE_BUILD={WANTED}, but {why_cuda or why}")
    if why:
        return []
    found = Extension(
        "svdecode.ops._compiled",
        [str(CSRC / name) for name in CPP],
        depends=[str(path) for path in CSRC.rglob("*.h")] + [str(path) for path in CSRC.rglob("*.inc")],
        include_dirs=[str(torch / "include")],
        define_macros=[STABLE_ABI, ("SVDECODE_NAMESPACE", "svdecode_compiled"), ("SVDECODE_SOURCES", f'"{sources()}"')],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu", "dl"],
        extra_compile_args=COMPILE,
        extra_objects=[],
        language="c++",
        py_limited_api=True,  # torch loads it, not Python: one binary for all Python versions
    )
    found.cuda = why_cuda is None
    return [found]


modules = extensions()
scratch = tempfile.TemporaryDirectory(prefix="svdecode-build-")
setup(
    # kernels/ must not become the importable name `kernels`, another project's package that transformers probes for.
    packages=[*find_packages(include=["svdecode", "svdecode.*"]), "svdecode.kernels"],
    package_dir={"svdecode.kernels": "kernels"},
    ext_modules=modules,
    cmdclass={"build_ext": BuildOperators, "build_py": BuildPython},
    options={
        # A folder of its own for each build: what an earlier one left in build/ would go into the wheel.
        "build": {"build_base": scratch.name},
        **({"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {}),
    },
)
