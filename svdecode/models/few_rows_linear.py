"""Linear layers on a CPU for the few rows of a decoding step: the weights are read once.

torch's matrix product is made for many rows: two rows cost it 1.7 times one and sixteen 2.9 times, though all wait for the same
weights (SmolLM2-135M, AVX2). The C++ operator (`csrc/cpu/few_rows_linear.h`) makes the doubled rows of `mode="paired"` nearly
free. Where it is not built, or rows are many, gradients are on or the model is elsewhere, the layer is torch's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from svdecode.ops import compiled

_NATIVE_BFLOAT16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()

MAX_ROWS = {torch.float32: 32, torch.bfloat16: 32 if _NATIVE_BFLOAT16 else math.inf}
"""Up to where it is faster than torch. With AVX2 that is 64 rows in float32 and any number in bfloat16 (7 times as fast)."""


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
            try:
                return torch.ops.svdecode_compiled.few_rows_linear(x, weight, self.bias)
            except RuntimeError:  # another width, or a bias of another dtype: torch says it in its own words
                return super().forward(x)
        return super().forward(x)


def use_few_rows(model: nn.Module) -> None:
    """Change the linear layers of a module tree of our own (`share_weights`)."""
    if compiled.WHY_MISSING is None:
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in module.__dict__:  # accelerate's hooks put one there
                module.__class__ = FewRowsLinear
