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
from opensora.ops._modulation import check, dense_rows, per_frame, split_frames, sum_frames

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_Row = Tensor | None  # a modulation, [B, C]


def reference(
    x: Tensor, shift: Tensor, scale: Tensor, select: _Row, shift0: _Row, scale0: _Row, eps: float
) -> Tensor:
    """Compute the op in plain PyTorch: float32 statistics, then modulation in x's dtype."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).to(x.dtype)
    shift, scale = per_frame(shift, shift0, select), per_frame(scale, scale0, select)
    return (split_frames(normed, select) * (1 + scale) + shift).reshape(x.shape)


def reference_backward(
    grad: Tensor, x: Tensor, scale: Tensor, select: _Row, scale0: _Row, eps: float
) -> tuple[Tensor, Tensor]:
    """Return what `_backward` returns. With n = normalised x and g = grad * (1 + scale):

    dx = (g - mean(g) - n * mean(g * n)) / sqrt(var(x) + eps)
    dshift = sum of grad, dscale = sum of grad * n, over the tokens that share the row
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens, grads = (split_frames(t.to(wide), select) for t in (x, grad))
    centred = tokens - tokens.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n, g = centred * rstd, grads * (1 + per_frame(scale, scale0, select).to(wide))
    dx = rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    sums = torch.stack((grads.sum(2), (grads * n).sum(2)), dim=2)  # [B, T, 2, C]
    return dx.reshape(x.shape).to(x.dtype), sum_frames(sums, select).to(x.dtype)


def _fake_forward(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, x: Tensor, scale: Tensor, select: _Row, *_: Any) -> Any:
    dmodulation = x.new_empty(x.shape[0], 2 if select is None else 4, x.shape[-1])
    return torch.empty_like(x, memory_format=torch.contiguous_format), dmodulation


_forward = Op(
    "layernorm_modulate_forward(Tensor x, Tensor shift, Tensor scale, Tensor? select, "
    "Tensor? shift0, Tensor? scale0, float eps) -> Tensor",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=reference,
    cuda="opensora.kernels.layernorm_modulate:forward",
)

# dmodulation [B, 2 or 4, C]: the gradients of shift and scale (and of shift0 and scale0).
_backward = Op(
    "layernorm_modulate_backward(Tensor grad, Tensor x, Tensor scale, Tensor? select, "
    "Tensor? scale0, float eps) -> (Tensor dx, Tensor dmodulation)",
    fake=_fake_backward,
    dtypes=DTYPES,
    reference=reference_backward,
    cuda="opensora.kernels.layernorm_modulate:backward",
)


class _LayerNormModulate(torch.autograd.Function):
    """Save x and no statistics: backward has the row in registers and recomputes them there."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, _, scale, select, _, scale0, eps = args
        ctx.save_for_backward(x, scale, select, scale0)
        ctx.eps = eps
        y: Tensor = _forward(*args)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dmodulation = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
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

    Statistics are float32 (float64 for float64 input) and two-pass; kernels round once, at the
    end. Deterministic. Differentiable once, in `x` and in every shift and scale.

    Args:
        x: Tokens [B, N, C] or [B, T, S, C], floating point. A kernel copies what is not contiguous.
        shift: Added last, [B, C] with rows any stride apart; cast to x's dtype.
        scale: Factor less one, laid out like `shift`.
        select: Bool [B, T]: frames that take (shift, scale); the others take (shift0, scale0). A
            frame is a run of N / T tokens.
        shift0: Like `shift`; given exactly when `select` is.
        scale0: Like `scale`; given exactly when `select` is.
        eps: Added to the variance, > 0.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        ValueError: Shapes, devices or the set of arguments do not fit together.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `x`.

    Source: adaptive layer norm of DiT (Peebles and Xie, 2023), per frame as in Open-Sora 1.2.
    """
    check(x, select, shift=shift, scale=scale, shift0=shift0, scale0=scale0)
    shift, scale = dense_rows(shift, x.dtype), dense_rows(scale, x.dtype)
    if shift0 is not None and scale0 is not None:
        shift0, scale0 = dense_rows(shift0, x.dtype), dense_rows(scale0, x.dtype)
    if not _forward.serves(x):
        return reference(x, shift, scale, select, shift0, scale0, eps)
    recorded = needs_grad(x, shift, scale, shift0, scale0)
    run = _LayerNormModulate.apply if recorded else _forward
    y: Tensor = run(x.contiguous(), shift, scale, select, shift0, scale0, eps)
    return y
