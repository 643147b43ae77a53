"""A linear layer that adds bias and GELU inside the product, on a CPU while nothing is recorded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.ops import _library


class Linear(nn.Linear):
    """`nn.Linear`, of which oneDNN does the rest as well where nothing is recorded on a CPU.

    PyTorch's own layer copies the bias into the result before the product and takes another pass
    for the activation. The parameters are those of `nn.Linear`.
    """

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Return x W' + b [..., out] for x [..., in], through GELU (tanh) where it is asked for."""
        if _fused(x, self.weight, self.bias):
            activation: Any = ("gelu", [], "tanh") if gelu else ("none", [], "")
            result: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, *activation
            )
            return result
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if gelu else y


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if _library.mode == "reference" or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    if _library.needs_grad(x, weight, bias) or not x.numel():
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    same = x.dtype == weight.dtype and weight.device.type == "cpu" and weight.is_contiguous()
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    if not same or not plain or torch.is_autocast_enabled("cpu"):
        return False
    if x.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return x.dtype == torch.float32
