"""Convolve images and videos in one op: the convolutions of both VAEs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.functional import causal_conv3d


def _lay_out_weight(module: nn.Module, *_: object) -> None:
    """Put the weight in the order in which kernels read it, once and not at every call.

    `safetensors` stores no such order: `save_pretrained` puts the weights back.
    """
    weight = next(w for name, w in module.named_parameters() if name.endswith("weight"))
    layout = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    weight.data = weight.data.contiguous(memory_format=layout)


def _convolve(
    x: Tensor, conv: nn.Conv2d | nn.Conv3d, stride: tuple[int, ...], residual: Tensor | None
) -> Tensor:
    """Apply the op with a library module's parameters, in autocast's dtype where there is one."""
    weight, bias, device = conv.weight, conv.bias, x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    # Under autocast the residual stream is wider than the convolution.
    fused = residual if residual is not None and residual.dtype == x.dtype else None
    out = causal_conv3d(x, weight, bias, stride=stride, residual=fused)
    return out if residual is None or residual is fused else residual + out


class Conv2d(nn.Conv2d):
    """Convolve images, and add a residual.

    Stride 1 pads with zeros by half a kernel on all sides; stride 2 with kernel 3 by one row below
    and one column at the right, so that it halves height and width (floor).

    Args:
        in_channels: C of the input [B, C, H, W].
        out_channels: C of the output.
        kernel_size: 1 or 3, of both axes.
        stride: 1 or 2, of both axes.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        _lay_out_weight(self)
        self.register_load_state_dict_post_hook(_lay_out_weight)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return [B, out_channels, H // stride, W // stride].

        Args:
            x: [B, in_channels, H, W].
            residual: added to the result.
        """
        return _convolve(x, self, (self.stride[0], self.stride[1]), residual)


class CausalConv3d(nn.Module):
    """Convolve in space and time so that a frame depends on itself and earlier frames only.

    Height and width are padded by half a kernel on both sides; time is padded in front only, by
    dilation * (kt - 1) + 1 - stride_t zero frames.

    Args:
        in_channels: C of the input [B, C, T, H, W].
        out_channels: C of the output.
        kernel_size: (kt, kh, kw), or one number for all; kh and kw are odd.
        strides: (stride_t, stride_h, stride_w).
        dilation: step between the kernel's frames.
        bias: whether a bias is added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        *,
        strides: tuple[int, int, int] = (1, 1, 1),
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(kernel_size, int):
            kernel_size = (kernel_size, kernel_size, kernel_size)
        kt, kh, kw = kernel_size
        self.strides = strides
        self.time_pad = dilation * (kt - 1) + 1 - strides[0]
        self.conv = nn.Conv3d(
            in_channels,
            out_channels,
            kernel_size,
            stride=strides,
            dilation=(dilation, 1, 1),
            padding=(0, kh // 2, kw // 2),
            bias=bias,
        )
        _lay_out_weight(self)
        self.register_load_state_dict_post_hook(_lay_out_weight)  # type: ignore[no-untyped-call]
        # What the op takes; published models have nothing else.
        self._is_common = (
            {kt, kh, kw} <= {1, 3} and strides in ((1, 1, 1), (2, 1, 1)) and dilation == 1
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return [B, out_channels, ceil(T / stride_t), H, W].

        Args:
            x: [B, in_channels, T, H, W].
            residual: added to the result.
        """
        conv = self.conv
        if not self._is_common:
            if self.time_pad > 0:
                x = F.pad(x, (0, 0, 0, 0, self.time_pad, 0))
            out: Tensor = conv(x)
            return out if residual is None else residual + out
        return _convolve(x, conv, self.strides, residual)
