"""`svdecode info`."""

from __future__ import annotations

import json
import platform

from rich.console import Console
from rich.table import Table

from svdecode.cli.options import JsonOption


def info(as_json: JsonOption = False) -> None:
    """What is installed here, and which backends can run."""
    import torch

    from svdecode.common.versions import installed, untested
    from svdecode.constants import VERSION
    from svdecode.ops.backends import backends

    packages = installed()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = backends()
    if as_json:
        rows = {name: backend._asdict() for name, backend in found.items()}
        report = {"svdecode": VERSION, "python": platform.python_version(), "packages": packages, "gpu": gpu,
                  "untested": untested()}  # fmt: skip
        print(json.dumps({**report, "backends": rows}))
        return
    console = Console()
    console.print(f"svdecode {VERSION}, Python {platform.python_version()}, GPU: {gpu or 'none'}")
    console.print(", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items()))
    table = Table("backend", "here", "why")
    for name, backend in found.items():
        table.add_row(name, "yes" if backend.available else "no", backend.reason)
    console.print(table)
    for sentence in untested():
        console.print(sentence)
