"""What the figures were measured on: card, driver, clocks, and the versions of everything that matters.

    python bench/environment.py [--output FILE] [--installed FILE]

Exit status 1 where something is missing that was expected: then the figures of that backend would be missing without a word.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import svdecode
from svdecode.common.files import to_json, write_atomically
from svdecode.common.timing import processor_name

PACKAGES = ("torch", "triton", "transformers", "peft", "pytest", "pytest-xdist", "hypothesis", "matplotlib", "quack-kernels",
            "liger-kernel", "nvidia-cutlass-dsl")  # fmt: skip
ASKED = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,"
    "memory.total,ecc.mode.current,mig.mode.current"
)


def output_of(*command: str) -> str | None:
    """What a program prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def nvidia_smi() -> dict[str, str] | None:
    """The state of the card by nvidia-smi's names, or None without the program."""
    text = output_of("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader", "--id=0")
    return (
        None
        if text is None
        else dict(zip(ASKED.split(","), (value.strip() for value in text.split(",")), strict=False))
    )


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def card() -> dict[str, object]:
    """What torch says of the first GPU."""
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": [found.major, found.minor],
        "processors": found.multi_processor_count,
        "memory": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cards": torch.cuda.device_count(),
    }


def environment() -> dict[str, object]:
    """Everything, fit for JSON."""
    root = Path(__file__).parents[1]
    nvcc = output_of("nvcc", "--version")
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "card": card() if torch.cuda.is_available() else None,
        "nvidia-smi": nvidia_smi(),
        "cuda_of_torch": torch.version.cuda,
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "compute-sanitizer": shutil.which("compute-sanitizer"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "svdecode": svdecode.__version__,
        "svdecode_from": str(Path(svdecode.__file__).parent),
        "commit": output_of("git", "-C", str(root), "rev-parse", "HEAD"),
        "backends": {name: found._asdict() for name, found in svdecode.backends().items()},
    }


def main() -> int:
    """Print it and write it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--installed", type=Path, help="what bench/install.py wrote: fail where its kernels cannot be used"
    )
    arguments = parser.parse_args()
    found = environment()
    text = to_json(found, indent=1)
    print(text)
    if arguments.output:
        write_atomically(arguments.output, text.encode())
    cuda = found["backends"]["cuda"]
    installed = arguments.installed
    built = bool(
        installed and installed.is_file() and json.loads(installed.read_text(encoding="utf-8"))["cuda_kernels"]
    )
    if built and not cuda["available"]:
        print(f"The CUDA kernels were built, but cannot be used: {cuda['reason']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
