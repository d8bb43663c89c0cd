"""Linear layers on a CPU for the few rows of a decoding step: the weights are read once.

torch's matrix product is made for many rows: two rows cost it 1.5 times one, though both wait for the same weights. The C++
operator (`csrc/cpu/few_rows_linear.h`) makes the doubled row of `mode="paired"` nearly free. Where it is not built, or rows are
many, gradients are on or the model is elsewhere, the layer is torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svdecode import compiled

MAX_ROWS = {torch.float32: 8, torch.bfloat16: 32}
"""Up to where it was not slower than torch, with AVX2."""


class FewRowsLinear(nn.Linear):
    """torch.nn.Linear with another product for few rows; the class of an existing layer is changed to it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        weight = self.weight
        if (
            x.numel() <= MAX_ROWS.get(x.dtype, 0) * weight.shape[1]
            and weight.dtype == x.dtype
            and x.device.type == weight.device.type == "cpu"
            and not torch.is_grad_enabled()
            and x.is_contiguous()
            and weight.is_contiguous()
            and type(weight) in (nn.Parameter, Tensor)  # no quantised or distributed one
            and weight.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        ):
            return torch.ops.svdecode_compiled.few_rows_linear(x, weight, self.bias)
        return super().forward(x)


def use_few_rows(model: nn.Module) -> None:
    """Change the linear layers of a module tree of our own (`share_weights`)."""
    if compiled.WHY_MISSING is None:
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in module.__dict__:  # accelerate's hooks put one there
                module.__class__ = FewRowsLinear
