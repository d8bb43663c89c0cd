"""Install this checkout into a folder of its own, with as many of the compiled operators as the machine can build.

    python bench/install.py FOLDER [--seconds N] [--output FILE]

With nvcc the CUDA kernels are built. Where there is no nvcc, or the build fails, the C++ operators alone are tried, then the
Python files are copied; the figures of Triton do not need more. Nothing is downloaded, and the environment is left as it is:
whoever uses the folder puts it on PYTHONPATH. Exit status 1 where a build failed that should have worked; the folder is usable
then too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARE = {"cuda": 0.75, "cpu": 0.6}
"""Of the time that is left, for a build: what comes after it needs some too."""


def has_nvcc() -> bool:
    """By the rules of setup.py: on the PATH, or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return bool(shutil.which("nvcc") or (home and shutil.which("nvcc", path=str(Path(home) / "bin"))))


def build(kind: str, target: Path, seconds: float) -> str | None:
    """Install with SVDECODE_BUILD=kind; what went wrong, or None."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-cache-dir",
    ]
    command += ["--disable-pip-version-check", "-v", "--target", str(target), str(ROOT)]
    try:
        # nvcc compiles for one architecture after another unless it is told otherwise.
        environment = {"NVCC_APPEND_FLAGS": "--threads=0", **os.environ, "SVDECODE_BUILD": kind}
        done = subprocess.run(command, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"the build took more than {seconds:.0f} s"
    return None if done.returncode == 0 else f"pip ended with status {done.returncode}; its output is above"


def copy(target: Path) -> None:
    """The Python files alone, laid out as an installation is."""
    compiled = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "svdecode", target / "svdecode", ignore=compiled)
    shutil.copytree(ROOT / "kernels", target / "svdecode" / "kernels", ignore=compiled)


def install(folder: Path, seconds: float, kinds: list[str]) -> dict[str, object]:
    """Fill the folder by the first way that works; which one, and what was wrong with those before."""
    until = time.monotonic() + seconds
    wrong = {}
    part = folder.with_name(folder.name + ".part")
    used = "python"
    for kind in kinds:
        shutil.rmtree(part, ignore_errors=True)
        wrong[kind] = build(kind, part, SHARE[kind] * (until - time.monotonic()))
        if wrong[kind] is None:
            used = kind
            break
        print(f"SVDECODE_BUILD={kind} failed: {wrong[kind]}", flush=True)
    if used == "python":
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        copy(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return {"built": used, "cuda_kernels": used == "cuda", "failed": {k: v for k, v in wrong.items() if v}}


def main() -> int:
    """Install, say what there is now, and write it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=400.0, help="for all builds together")
    parser.add_argument("--no-build", action="store_true", help="copy the Python files, compile nothing")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    nvcc = has_nvcc()
    kinds = [] if arguments.no_build else ["cuda", "cpu"] if nvcc else ["cpu"]
    found = {"nvcc": nvcc, **install(arguments.folder, arguments.seconds, kinds)}
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print({"cuda": "With the CUDA kernels.", "cpu": "WITHOUT the CUDA kernels, with the C++ operators.",
           "python": "WITHOUT any compiled operators: Triton and the reference alone."}[found["built"]])  # fmt: skip
    if not nvcc:
        print("nvcc was not found on the PATH or in CUDA_HOME.")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
