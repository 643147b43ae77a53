"""Fuse the gate of an adaLN branch with the residual that takes it.

    z = x + gate * y

Kernels: C++ on CPU (`csrc/cpu/gate_residual.cpp`), Triton on CUDA (`kernels/gate_residual.py`).
Used by STDiT3 blocks where no norm follows at once; `residual_layernorm_modulate` serves where one
does.
Axes: B batch, T frames, S patches per frame, N = T*S tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops._library import Op, needs_grad
from opensora.ops._modulation import check, dense_rows, per_frame, split_frames, sum_frames

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_Row = Tensor | None  # a gate, [B, C]


def reference(x: Tensor, y: Tensor, gate: Tensor, select: _Row, gate0: _Row) -> Tensor:
    """Compute the op in plain PyTorch, in the inputs' dtypes; the result takes x's."""
    gated = per_frame(gate, gate0, select) * split_frames(y, select)
    return (x + gated.reshape(x.shape)).to(x.dtype)


def reference_backward(
    grad: Tensor, y: Tensor, gate: Tensor, select: _Row, gate0: _Row
) -> tuple[Tensor, Tensor]:
    """Return what `_backward` returns: dy = grad * gate, dgate = sum of grad * y over its tokens.

    The gradient of x is `grad` itself.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    branch, grads = (split_frames(t.to(wide), select) for t in (y, grad))
    dy = grads * per_frame(gate, gate0, select)
    sums = (grads * branch).sum(2, keepdim=True)  # [B, T, 1, C]
    return dy.reshape(y.shape).to(y.dtype), sum_frames(sums, select).to(gate.dtype)


def _fake_forward(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, y: Tensor, gate: Tensor, select: _Row, *_: Any) -> Any:
    dgate = gate.new_empty(y.shape[0], 1 if select is None else 2, y.shape[-1])
    return torch.empty_like(y, memory_format=torch.contiguous_format), dgate


_forward = Op(
    "gate_residual_forward(Tensor x, Tensor y, Tensor gate, Tensor? select, Tensor? gate0) "
    "-> Tensor",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=reference,
    cuda="opensora.kernels.gate_residual:forward",
)

# dgate [B, 1 or 2, C]: the gradient of gate (and of gate0).
_backward = Op(
    "gate_residual_backward(Tensor grad, Tensor y, Tensor gate, Tensor? select, Tensor? gate0) "
    "-> (Tensor dy, Tensor dgate)",
    fake=_fake_backward,
    dtypes=DTYPES,
    reference=reference_backward,
    cuda="opensora.kernels.gate_residual:backward",
)


class _GateResidual(torch.autograd.Function):
    """Save y and the gates; x is not needed, and its gradient is the incoming one."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[1:])
        z: Tensor = _forward(*args)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not any(ctx.needs_input_grad[1:]):
            return grad, None, None, None, None
        dy, dgates = _backward(grad.contiguous(), *ctx.saved_tensors)
        dgate, *others = dgates.unbind(1)
        return grad, dy, dgate, None, others[0] if others else None


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    select: Tensor | None = None,
    gate0: Tensor | None = None,
) -> Tensor:
    """Add a gated branch to the residual stream: `x + gate * y`.

    Kernels compute in float32 and round once; the reference computes in the inputs' dtypes.
    Deterministic. Differentiable once, in `x`, `y` and the gates.

    Args:
        x: Residual stream [B, N, C] or [B, T, S, C], floating point. A kernel copies what is not
            contiguous.
        y: Branch of x's shape, floating point; its dtype may differ, as under autocast.
        gate: Factor, [B, C] with rows any stride apart; cast to x's dtype.
        select: Bool [B, T]: frames that take `gate`; the others take `gate0`. A frame is a run of
            N / T tokens.
        gate0: Like `gate`; given exactly when `select` is.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        ValueError: Shapes, devices or the set of arguments do not fit together.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `x`.

    Source: adaLN-Zero gates of DiT (Peebles and Xie, 2023), per frame as in Open-Sora 1.2.
    """
    check(x, select, gate=gate, gate0=gate0)
    if y.shape != x.shape or y.device != x.device or not y.is_floating_point():
        raise ValueError(
            f"y must be float {list(x.shape)} on {x.device} as x is, "
            f"got {y.dtype} {list(y.shape)} on {y.device}"
        )
    gate = dense_rows(gate, x.dtype)
    gate0 = gate0 if gate0 is None else dense_rows(gate0, x.dtype)
    if not _forward.serves(x):
        return reference(x, y, gate, select, gate0)
    run = _GateResidual.apply if needs_grad(x, y, gate, gate0) else _forward
    z: Tensor = run(x.contiguous(), y.contiguous(), gate, select, gate0)
    return z
