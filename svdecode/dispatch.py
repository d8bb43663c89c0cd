"""How a public operator reaches its backend: through `torch.ops.svdecode`, or the short way where nothing looks on."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from svdecode import validation
from svdecode.backends import choose

backends = sys.modules["svdecode.backends"]  # `svdecode.backends` is the function of that name


def backend_for(backend: object, logits_pre: Tensor, logits_ft: Tensor) -> str:
    """The backend of a call, by its argument, the device and the dtypes."""
    return choose(backend, logits_ft.device.type, logits_pre.dtype, logits_ft.dtype)


_RUNNERS: dict[tuple, Callable] = {}


def runner_for(operator: str, backend: object, logits_pre: Tensor, logits_ft: Tensor) -> Callable:
    """What computes an operator on these logits; remembered, since finding it takes a tenth of a small call."""
    if backend is not None:
        return backends.implementation(backend_for(backend, logits_pre, logits_ft), operator)
    key = (operator, backends.PREFERRED, logits_ft.device, logits_pre.dtype, logits_ft.dtype)
    run = _RUNNERS.get(key)
    if run is None:
        run = _RUNNERS[key] = backends.implementation(backend_for(None, logits_pre, logits_ft), operator)
    return run


def is_watched(*inputs: object) -> bool:
    """Whether a call must go through torch.ops: a gradient is wanted, or torch.compile or another mode looks on.

    The dispatcher with its autograd in Python costs more than the kernel of a decode step, hence the short way where it is not
    needed: `call`.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    wants_gradients = torch.is_grad_enabled()
    for x in inputs:
        if type(x) is Tensor or type(x) is Parameter:
            if wants_gradients and x.requires_grad:
                return True
        elif isinstance(x, Tensor):
            return True
    return False


def call(operator: str, backend: str, *arguments, labels: Tensor | None = None):
    """The operator under torch.ops.svdecode, or what it would call."""
    if is_watched(*arguments):
        return getattr(torch.ops.svdecode, operator)(*arguments, backend)
    if labels is not None:
        validation.check_label_range(labels, arguments[1].shape[-1])
    return backends.implementation(backend, operator)(*arguments)
