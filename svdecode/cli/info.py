"""`svdecode info`."""

from __future__ import annotations

import platform

from svdecode.cli.options import JsonOption
from svdecode.cli.terminal import print_table
from svdecode.common.files import to_json


def info(as_json: JsonOption = False) -> None:
    """Show what is installed and which backends run here."""
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
        print(to_json({**report, "backends": rows}))
        return
    print(f"svdecode {VERSION}, Python {platform.python_version()}, GPU: {gpu or 'none'}")
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items()))
    rows = [[name, "yes" if backend.available else "no", backend.reason] for name, backend in found.items()]
    print_table(None, ["backend", "here", "why"], rows, words=("why",))
    for sentence in untested():
        print(sentence)
