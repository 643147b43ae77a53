"""Fuse LayerNorm without affine with the adaLN modulation that follows it.

    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift

Kernels: C++ on CPU (`csrc/cpu/layernorm_modulate.cpp`), Triton on CUDA
(`kernels/layernorm_modulate.py`). Used by every STDiT3 block, twice, and by the final layer.
Axes: B batch, T frames, S patches per frame, N = T*S tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops._library import Op, needs_grad

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    select: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute the op in plain PyTorch: float32 statistics, then modulation in x's dtype."""
    if select is not None and shift0 is not None and scale0 is not None:
        shift, scale = (
            torch.where(select[..., None], chosen[:, None], other[:, None])[:, :, None]
            for chosen, other in ((shift, shift0), (scale, scale0))
        )  # [B, T, 1, C]
    else:
        shift, scale = shift[:, None, None], scale[:, None, None]  # [B, 1, 1, C]
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).to(x.dtype)
    by_frame = normed.reshape(x.shape[0], shift.shape[1], -1, x.shape[-1])
    return (by_frame * (1 + scale) + shift).reshape(x.shape)


def reference_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    select: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients that `_backward` returns, written out instead of by autograd.

    With n = normalised x and g = grad * (1 + scale):

        dx = (g - mean(g) - n * mean(g * n)) / sqrt(var(x) + eps)
        dshift = sum of grad, dscale = sum of grad * n, over the tokens that a row modulates
    """
    batch, channels = x.shape[0], x.shape[-1]
    frames = 1 if select is None else select.shape[1]
    rows = [t.reshape(batch, frames, -1, channels) for t in (x, grad)]  # [B, T, S, C]
    x4, dy = (r if r.dtype == torch.float64 else r.float() for r in rows)
    scale4 = scale[:, None, None]
    if select is not None and scale0 is not None:
        scale4 = torch.where(select[:, :, None, None], scale4, scale0[:, None, None])
    centred = x4 - x4.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n, g = centred * rstd, dy * (1 + scale4)
    dx = rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    sums = torch.stack((dy.sum(2), (dy * n).sum(2)), dim=2)  # [B, T, 2, C]
    if select is None:
        dmodulation = sums[:, 0]
    else:
        chosen = select[:, :, None, None].to(sums.dtype)
        dmodulation = torch.cat(((sums * chosen).sum(1), (sums * (1 - chosen)).sum(1)), dim=1)
    return dx.reshape(x.shape).to(x.dtype), dmodulation.to(x.dtype)


def _fake_forward(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor, x: Tensor, scale: Tensor, select: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    modulations = 2 if select is None else 4
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(x.shape[0], modulations, x.shape[-1])


_forward = Op(
    "layernorm_modulate_forward(Tensor x, Tensor shift, Tensor scale, Tensor? select, "
    "Tensor? shift0, Tensor? scale0, float eps) -> Tensor",
    fake=_fake_forward,
    dtypes=DTYPES,
    cuda="opensora.kernels.layernorm_modulate:forward",
)

# dmodulation [B, 2 or 4, C] holds the gradients of shift, scale (, shift0, scale0).
_backward = Op(
    "layernorm_modulate_backward(Tensor grad, Tensor x, Tensor scale, Tensor? select, "
    "Tensor? scale0, float eps) -> (Tensor dx, Tensor dmodulation)",
    fake=_fake_backward,
    dtypes=DTYPES,
    cuda="opensora.kernels.layernorm_modulate:backward",
)


class _LayerNormModulate(torch.autograd.Function):
    """Save x alone: the kernels recompute its statistics while the row is in registers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        select: Tensor | None,
        shift0: Tensor | None,
        scale0: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, select, scale0)
        ctx.eps = eps
        return _forward(x, shift, scale, select, shift0, scale0, eps)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, select, scale0 = ctx.saved_tensors
        dx, dmodulation = _backward(grad.contiguous(), x, scale, select, scale0, ctx.eps)
        dshift, dscale, *others = dmodulation.unbind(1)
        dshift0, dscale0 = others or (None, None)
        return dx, dshift, dscale, None, dshift0, dscale0, None


def layernorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    select: Tensor | None = None,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise every token of `x` and modulate it: `layer_norm(x) * (1 + scale) + shift`.

    Statistics are float32 (float64 for float64 input) and two-pass; the kernels round once, at
    the end. Results are deterministic. Gradients flow to `x` and to every shift and scale.

    Args:
        x: Tokens [B, N, C] or [B, T, S, C], floating point. A kernel reads dense rows: any
            layout but the contiguous one costs a copy.
        shift: Added after scaling, [B, C] with any row stride; cast to x's dtype.
        scale: Deviation of the factor from one, like `shift`.
        select: Which frames take (shift, scale); the others take (shift0, scale0). Bool [B, T]; a
            frame is a run of N / T tokens. Comes with `shift0` and `scale0`, or not at all.
        shift0: Like `shift`, for the frames that `select` leaves out (timestep zero).
        scale0: Like `scale`, for those frames.
        eps: Added to the variance, > 0.

    Returns:
        Tensor of x's shape and dtype, contiguous when a kernel serves.

    Raises:
        ValueError: Shapes do not fit together.
        NotImplementedError: Kernels are required (`OPENSORA_KERNELS`) and none serves.

    Source: adaptive layer norm of DiT (Peebles and Xie, 2023); selection per frame after
        Open-Sora 1.2's masked frames.
    """
    _check(x, shift, scale, select, shift0, scale0)
    rows = [None if t is None else t.to(x.dtype) for t in (shift, scale, shift0, scale0)]
    shift, scale, shift0, scale0 = rows  # type: ignore[assignment]
    if not _forward.serves(x):
        return reference(x, shift, scale, select, shift0, scale0, eps)
    x = x.contiguous()
    if needs_grad(x, shift, scale, shift0, scale0):
        return _LayerNormModulate.apply(x, shift, scale, select, shift0, scale0, eps)  # type: ignore[no-any-return]
    return _forward(x, shift, scale, select, shift0, scale0, eps)  # type: ignore[no-any-return]


def _check(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    select: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
) -> None:
    """Raise ValueError, with the shape expected and the shape given, where the call is wrong."""
    if x.dim() not in (3, 4) or not x.is_floating_point():
        raise ValueError(
            f"x must be a float [B, N, C] or [B, T, S, C], got {x.dtype} {list(x.shape)}"
        )
    if (select is None) != (shift0 is None) or (select is None) != (scale0 is None):
        raise ValueError("select, shift0 and scale0 come together: pass all three or none")
    row = (x.shape[0], x.shape[-1])
    for name, t in (("shift", shift), ("scale", scale), ("shift0", shift0), ("scale0", scale0)):
        if t is not None and t.shape != row:
            raise ValueError(f"{name} must be [B, C] = {list(row)} to match x, got {list(t.shape)}")
    if select is None:
        return
    if select.dtype != torch.bool or select.dim() != 2 or select.shape[0] != x.shape[0]:
        raise ValueError(
            f"select must be bool [B, T] with B = {x.shape[0]}, got {select.dtype} "
            f"{list(select.shape)}"
        )
    frames = select.shape[1]
    if x.dim() == 4 and x.shape[1] != frames:
        raise ValueError(f"select has {frames} frames, but x has T = {x.shape[1]}")
    if x.dim() == 3 and (frames == 0 or x.shape[1] % frames):
        raise ValueError(f"select has {frames} frames, which do not divide x's N = {x.shape[1]}")
