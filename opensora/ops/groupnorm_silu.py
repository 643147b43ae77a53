"""Fuse GroupNorm with the SiLU that follows it.

    u = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    y = u * sigmoid(u), or u without `silu`

Mean and variance are of a group: C / G neighbouring channels of a sample, all pixels.
Kernels: C++ on CPU (`csrc/cpu/groupnorm_silu.cpp`), Triton on CUDA (`kernels/groupnorm_silu.py`).
Used by every residual block of both VAEs and before their last convolutions; without SiLU by the
attention of the 2D VAE.
Axes: B batch, C channels, G groups, P = H*W or T*H*W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops._channels_last import channels_last
from opensora.ops._library import Op, needs_grad

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> Tensor:
    """Compute the op in plain PyTorch; the result has x's strides if x is dense."""
    # Dense first: on channels_last, torch's CPU kernel takes the variance as E[x^2] - E[x]^2,
    # which is 200 times as wrong at a mean of 300 and a spread of 1e-3.
    normed = torch.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    y = F.silu(normed) if silu else normed
    return torch.empty_like(x).copy_(y) if y.stride() != x.stride() else y


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean_rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_backward` returns. With n = normalised x, u = n * weight + bias:

    du = grad * s * (1 + u * (1 - s)) with s = sigmoid(u), or grad without `silu`
    dx = (du * weight - mean(du * weight) - n * mean(du * weight * n)) / sqrt(var(x) + eps)
    dweight = sum of du * n, dbias = sum of du, over samples and pixels
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = (x.shape[0], mean_rstd.shape[1], -1)  # [B, G, C / G * P]
    affine = (1, -1, *[1] * (x.dim() - 2))
    mean, rstd = mean_rstd.to(wide)[..., None, :].unbind(-1)  # [B, G, 1]
    n = ((x.to(wide).reshape(grouped) - mean) * rstd).view(x.shape)
    factor, du = weight.to(wide).view(affine), grad.to(wide)
    if silu:
        u = n * factor + bias.to(wide).view(affine)
        s = torch.sigmoid(u)
        du = du * s * (1 + u * (1 - s))
    g, n_grouped = (du * factor).reshape(grouped), n.view(grouped)
    dx = g - g.mean(-1, keepdim=True) - n_grouped * (g * n_grouped).mean(-1, keepdim=True)
    over = [i for i in range(x.dim()) if i != 1]
    sums = (du * n).sum(over), du.sum(over)
    return (dx * rstd).view(x.shape).to(x.dtype), sums[0].to(x.dtype), sums[1].to(x.dtype)


def _reference_forward(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """Compute what `_forward` returns."""
    grouped = x.float().reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(grouped, -1, correction=0)
    statistics = torch.stack((mean, torch.rsqrt(variance + eps)), -1)
    return reference(x, weight, bias, num_groups, eps, silu), statistics


def _reference_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `_backward` returns, in its layout."""
    dx, dweight, dbias = reference_backward(grad, x, *args)
    return torch.empty_like(x).copy_(dx), dweight, dbias


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, *_: Any) -> Any:
    statistics = x.new_empty(x.shape[0], num_groups, 2, dtype=torch.float32)
    return torch.empty_like(x), statistics


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Any:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


# x is channels_last; mean_rstd [B, G, 2] is float32.
_forward = Op(
    "groupnorm_silu_forward(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, "
    "bool silu) -> (Tensor y, Tensor mean_rstd)",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=_reference_forward,
    cuda="opensora.kernels.groupnorm_silu:forward",
)

_backward = Op(
    "groupnorm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, "
    "Tensor mean_rstd, bool silu) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_fake_backward,
    dtypes=DTYPES,
    reference=_reference_backward,
    cuda="opensora.kernels.groupnorm_silu:backward",
)


class _GroupNormSiLU(torch.autograd.Function):
    """Save x and the statistics of its groups; backward recomputes SiLU from them."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, *_, ctx.silu = args
        y: Tensor
        y, mean_rstd = _forward(*args)
        ctx.save_for_backward(x, weight, bias, mean_rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(channels_last(grad), *ctx.saved_tensors, ctx.silu)
        return (*gradients, None, None, None)


def groupnorm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-6,
    silu: bool = True,
) -> Tensor:
    """Normalise groups of channels of every sample, scale and shift them, and apply SiLU.

    Statistics are float32 (float64 for float64 input) and free of cancellation; kernels round
    once, at the end. Deterministic, and a sample's result does not depend on the others of its
    batch. Differentiable once, in x, weight and bias.

    Args:
        x: [B, C, H, W] or [B, C, T, H, W], floating point. A kernel copies what is not in
            channels_last or channels_last_3d memory format.
        weight: Factor of every channel, [C]; cast to x's dtype.
        bias: Added after it, [C]; cast to x's dtype.
        num_groups: G, divides C.
        eps: Added to the variance, > 0.
        silu: Whether SiLU follows.

    Returns:
        Tensor of x's shape and dtype; of a kernel in channels_last memory format.

    Raises:
        ValueError: Shapes or devices do not fit together.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `x`.

    Source: Wu and He, 2018, Group Normalization.
    """
    if x.dim() not in (4, 5) or not x.is_floating_point():
        raise ValueError(f"x must be float [B, C, H, W] or [B, C, T, H, W], got {_describe(x)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups != 0:
        raise ValueError(f"num_groups must divide C = {channels}, got {num_groups}")
    for name, row in (("weight", weight), ("bias", bias)):
        if row.shape != (channels,) or row.device != x.device:
            raise ValueError(f"{name} must be [C = {channels}] on {x.device}, got {_describe(row)}")
    if weight.dtype != x.dtype or bias.dtype != x.dtype:  # asked first: an idle `to` costs 0.9 us
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if not _forward.serves(x):
        return reference(x, weight, bias, num_groups, eps, silu)
    args = (channels_last(x), weight.contiguous(), bias.contiguous(), num_groups, eps, silu)
    run: Any = _GroupNormSiLU.apply if needs_grad(x, weight, bias) else _inference
    y: Tensor = run(*args)
    return y


def _inference(*args: Any) -> Tensor:
    y: Tensor = _forward(*args)[0]
    return y


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"
