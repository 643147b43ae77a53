"""Fuse the RMSNorm of queries and keys with their rotary positions, on packed qkv.

    q = rotate(q / rms(q) * q_weight), k = rotate(k / rms(k) * k_weight), v = v

Kernels: C++ on CPU (`csrc/cpu/qk_norm_rope.cpp`), Triton on CUDA (`kernels/qk_norm_rope.py`), and
there, where `OPENSORA_CUDA=c++` asks for it, `csrc/cuda/qk_norm_rope.cu`. Used
by the self-attention of every model: norm alone over patches, norm and rotation over frames, in
either order.
Axes: N positions, H heads, D head width; `position_dim` says which axis of qkv N is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops import _heads
from opensora.ops._library import Op, needs_grad

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_Row = Tensor | None  # a weight [D], or a table [N, D]


def reference(
    qkv: Tensor,
    q_weight: _Row,
    k_weight: _Row,
    cos: _Row,
    sin: _Row,
    position_dim: int,
    legacy: bool,
    eps: float,
) -> Tensor:
    """Compute the op in plain PyTorch, rounding where RMSNorm and the rotation do."""
    q, k, v = qkv.unbind(-3)
    cos, sin = _at_positions(cos, position_dim), _at_positions(sin, position_dim)
    q = _heads.prepare(q, q_weight, cos, sin, legacy, eps).to(qkv.dtype)
    k = _heads.prepare(k, k_weight, cos, sin, legacy, eps).to(qkv.dtype)
    return torch.stack((q, k, v), dim=-3)


def _reference_inplace(qkv: Tensor, *args: Any) -> None:
    qkv.copy_(reference(qkv, *args))


def reference_backward(
    grad: Tensor,
    qkv: Tensor,
    q_weight: _Row,
    k_weight: _Row,
    cos: _Row,
    sin: _Row,
    position_dim: int,
    legacy: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return what `_backward` returns; the formulas are those of `_heads.prepare_backward`."""
    (dq, dk, dv), (q, k, _) = grad.unbind(-3), qkv.unbind(-3)
    cos, sin = _at_positions(cos, position_dim), _at_positions(sin, position_dim)
    dq, dq_weight = _heads.prepare_backward(dq, q, q_weight, cos, sin, legacy, eps)
    dk, dk_weight = _heads.prepare_backward(dk, k, k_weight, cos, sin, legacy, eps)
    dqkv = torch.stack((dq.to(qkv.dtype), dk.to(qkv.dtype), dv), dim=-3)
    return dqkv, torch.stack((dq_weight, dk_weight))


def _at_positions(table: _Row, position_dim: int) -> _Row:
    """View a table [N, D] so that it broadcasts against q: [N, 1, ..., 1, D]."""
    if table is None:
        return None
    return table.view(table.shape[0], *[1] * (-position_dim - 3), table.shape[1])


def _fake_forward(qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _fake_inplace(qkv: Tensor, *_: Any) -> None:
    return None


def _fake_backward(grad: Tensor, qkv: Tensor, q_weight: _Row, *_: Any) -> Any:
    dweights = qkv.new_empty(2, 0 if q_weight is None else qkv.shape[-1], dtype=torch.float32)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), dweights


def _native(qkv: Tensor, *others: Any) -> tuple[Any, ...] | None:
    """Return the arguments of the kernel in C++, or None where it does not take them."""
    return (qkv, *others) if _heads.takes_native(qkv, others[2:4]) else None


_ARGUMENTS = (
    "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "int position_dim, bool legacy, float eps"
)
_forward = Op(
    f"qk_norm_rope_forward(Tensor qkv, {_ARGUMENTS}) -> Tensor",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=reference,
    cuda="opensora.kernels.qk_norm_rope:forward",
    native=_native,
)
_inplace = Op(
    f"qk_norm_rope_inplace(Tensor(a!) qkv, {_ARGUMENTS}) -> ()",
    fake=_fake_inplace,
    dtypes=DTYPES,
    reference=_reference_inplace,
    cuda="opensora.kernels.qk_norm_rope:inplace",
    native=_native,
)
# dweights [2, D] float32: the gradients of q_weight and k_weight; [2, 0] without them.
_backward = Op(
    f"qk_norm_rope_backward(Tensor grad, Tensor qkv, {_ARGUMENTS}) "
    "-> (Tensor dqkv, Tensor dweights)",
    fake=_fake_backward,
    dtypes=DTYPES,
    reference=reference_backward,
    cuda="opensora.kernels.qk_norm_rope:backward",
)


class _QkNormRope(torch.autograd.Function):
    """Save qkv and no statistics: backward has the row in registers and recomputes them there."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:5])
        ctx.options = args[5:]
        y: Tensor = _forward(*args)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint hands them out a single time
        q_weight = saved[1]
        dqkv, dweights = _backward(grad.contiguous(), *saved, *ctx.options)
        if q_weight is None:
            return dqkv, *[None] * 7
        return dqkv, *dweights.to(q_weight.dtype).unbind(0), *[None] * 5


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None = None,
    *,
    position_dim: int = -4,
    legacy: bool = False,
    eps: float = 1e-6,
    inplace: bool = False,
) -> Tensor:
    """Normalise queries and keys over the head width, then rotate them by their positions.

        n = cast(x / sqrt(mean(x^2) + eps)) * weight
        out[2i] = n[2i] cos[2i] - n[2i+1] sin[2i];  out[2i+1] = n[2i+1] cos[2i] + n[2i] sin[2i]

    The norm is float32 (float64 for float64 input) and rounded to qkv's dtype before the weight
    multiplies it; the kernel's next rounding is the last. Deterministic. Differentiable once, in
    `qkv` and both weights.

    Args:
        qkv: [..., N, ..., 3, H, D], queries first, floating point; no copy if dense.
        q_weight: [D], any floating dtype; None, like `k_weight`: no norm.
        k_weight: [D], of the same dtype.
        rotary: cos and sin [N, D] of the positions, without gradient, columns 2i and 2i + 1 equal
            as in `RotaryEmbedding.table` (kernels read one of them); None: no rotation.
        position_dim: the axis N of `qkv`, counted from the end: -4 for [B, N, 3, H, D], -5 for the
            frames of [B, T, S, 3, H, D].
        legacy: rotate before the norm instead of after it (weights of Open-Sora 1.1).
        eps: added to the mean square, > 0.
        inplace: write into `qkv` and return it; inference only.

    Returns:
        Tensor of qkv's shape and dtype, dense unless `inplace`; v is a copy.

    Raises:
        ValueError: shapes, devices or dtypes do not fit together, or `inplace` where a gradient is
            needed.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `qkv`.

    Source: rotary positions of Su et al. (2021), query-key norm of Dehghani et al. (2023), as in
    Open-Sora 1.2.
    """
    if qkv.dim() < 4 or qkv.shape[-3] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be float [..., N, 3, H, D], got {_heads.describe(qkv)}")
    if not -qkv.dim() <= position_dim <= -4:
        raise ValueError(f"position_dim must be in [{-qkv.dim()}, -4], got {position_dim}")
    _heads.check(qkv, q_weight, k_weight, rotary, qkv.shape[position_dim])
    recorded = needs_grad(qkv, q_weight, k_weight)
    if inplace and recorded:
        raise ValueError("inplace needs torch.no_grad(): a gradient would need the old values")
    if not _forward.serves(qkv):
        cos, sin = rotary or (None, None)
        y = reference(qkv, q_weight, k_weight, cos, sin, position_dim, legacy, eps)
        return qkv.copy_(y) if inplace else y
    if q_weight is not None and k_weight is not None:
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    args = (q_weight, k_weight, *_heads.dense_table(rotary), position_dim, legacy, eps)
    if inplace and qkv.is_contiguous():
        _inplace(qkv, *args)
        torch.autograd.graph.increment_version(qkv)  # a bare op does not tell autograd
        return qkv
    run = _QkNormRope.apply if recorded else _forward
    y = run(qkv.contiguous(), *args)
    return qkv.copy_(y) if inplace else y
