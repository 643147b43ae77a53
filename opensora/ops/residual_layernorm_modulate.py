"""Fuse a gated residual with the LayerNorm and the adaLN modulation that follow it.

    sum = x + gate * y            (x + y without gate)
    normed = (sum - mean(sum)) / sqrt(var(sum) + eps) * (1 + scale) + shift

Kernels: C++ on CPU (`csrc/cpu/residual_layernorm_modulate.cpp`), Triton on CUDA
(`kernels/residual_layernorm_modulate.py`). Used between the branches of an STDiT3 block and from
block to block: `gate_residual`, then `layernorm_modulate`, in one pass.
Axes: B batch, T frames, S patches per frame, N = T*S tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops import gate_residual, layernorm_modulate
from opensora.ops._library import Op, needs_grad
from opensora.ops._modulation import check, dense_rows

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_Row = Tensor | None  # a gate or a modulation, [B, C]


def reference(
    x: Tensor,
    y: Tensor,
    gate: _Row,
    shift: Tensor,
    scale: Tensor,
    select: _Row,
    gate0: _Row,
    shift0: _Row,
    scale0: _Row,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute the op in plain PyTorch, as the references of the two ops that it joins."""
    if gate is None:
        total = (x + y).to(x.dtype)
    else:
        total = gate_residual.reference(x, y, gate, select, gate0)
    return total, layernorm_modulate.reference(total, shift, scale, select, shift0, scale0, eps)


def reference_backward(
    dsum: Tensor | None,
    dnormed: Tensor,
    total: Tensor,
    y: Tensor | None,
    gate: _Row,
    scale: Tensor,
    select: _Row,
    gate0: _Row,
    scale0: _Row,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_backward` returns: dx = dsum + the gradient of the norm, dy = gate * dx,

    dgate = sum of dx * y over the tokens that share the row, dshift and dscale of the norm.
    """
    wide = torch.promote_types(total.dtype, torch.float32)
    dx, rows = layernorm_modulate.reference_backward(
        dnormed.to(wide), total.to(wide), scale, select, scale0, eps
    )
    dx = dx if dsum is None else dx + dsum
    dy = total.new_empty(0)
    if gate is not None and y is not None:
        dy, dgate = gate_residual.reference_backward(dx, y, gate.to(wide), select, gate0)
        each = (dgate.unflatten(1, (-1, 1)), rows.unflatten(1, (-1, 2)))
        rows = torch.cat(each, dim=2).flatten(1, 2)
    return dx.to(total.dtype), dy, rows.to(total.dtype)


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, total, y, gate, _, select, *_ = args
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    dy = total.new_empty(0)
    if gate is not None:
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    rows = (2 if gate is None else 3) * (1 if select is None else 2)
    return dx, dy, total.new_empty(total.shape[0], rows, total.shape[-1])


_forward = Op(
    "residual_layernorm_modulate_forward(Tensor x, Tensor y, Tensor? gate, Tensor shift, "
    "Tensor scale, Tensor? select, Tensor? gate0, Tensor? shift0, Tensor? scale0, float eps) "
    "-> (Tensor total, Tensor normed)",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=reference,
    cuda="opensora.kernels.residual_layernorm_modulate:forward",
)

# y comes with gate; without them dy is empty, for it equals dx. dmodulation [B, K or 2K, C]: the
# gradients of the K rows gate (if there is one), shift and scale, then of those that end in 0.
_backward = Op(
    "residual_layernorm_modulate_backward(Tensor? dsum, Tensor dnormed, Tensor total, Tensor? y, "
    "Tensor? gate, Tensor scale, Tensor? select, Tensor? gate0, Tensor? scale0, float eps) "
    "-> (Tensor dx, Tensor dy, Tensor dmodulation)",
    fake=_fake_backward,
    dtypes=DTYPES,
    reference=reference_backward,
    cuda="opensora.kernels.residual_layernorm_modulate:backward",
)


class _ResidualLayerNormModulate(torch.autograd.Function):
    """Save the sum, which its reader keeps anyway, and y where there is a gate; no statistics."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        _, y, gate, _, scale, select, gate0, _, scale0, eps = args
        total, normed = _forward(*args)
        kept = None if gate is None else y
        ctx.save_for_backward(total, kept, gate, scale, select, gate0, scale0)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.branch_dtype = eps, y.dtype
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, dnormed: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint hands them out a single time
        total, _, gate, *_ = saved
        if dnormed is None:  # nobody used the norm: rare, not worth a kernel
            dnormed = torch.zeros_like(total)
        dsum = None if dsum is None else dsum.contiguous()
        dx, dy, rows = _backward(dsum, dnormed.contiguous(), *saved, ctx.eps)
        if gate is None:
            dy = dx.to(ctx.branch_dtype)
        drows, count = rows.unbind(1), 2 if gate is None else 3
        chosen, others = ((None, None, None, *r)[-3:] for r in (drows[:count], drows[count:]))
        return dx, dy, *chosen, None, *others, None


def residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    select: Tensor | None = None,
    gate0: Tensor | None = None,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, and normalise and modulate the sum.

    Equals `gate_residual`, then `layernorm_modulate`: the sum is rounded to x's dtype, and its norm
    is taken as rounded. Statistics are float32 (float64 for float64 input) and two-pass; kernels
    round each result once. Deterministic. Differentiable once, in every tensor but `select`.

    Args:
        x: Residual stream [B, N, C] or [B, T, S, C], floating point. A kernel copies what is not
            contiguous.
        y: Branch of x's shape, floating point; its dtype may differ, as under autocast.
        gate: Factor of `y`, [B, C] with rows any stride apart, cast to x's dtype; None for 1.
        shift: Added last, laid out like `gate`.
        scale: Factor less one, laid out like `gate`.
        select: Bool [B, T]: frames that take (gate, shift, scale); the others take those that end
            in 0. A frame is a run of N / T tokens.
        gate0: Like `gate`; given exactly when `select` and `gate` are.
        shift0: Like `shift`; given exactly when `select` is.
        scale0: Like `scale`; given exactly when `select` is.
        eps: Added to the variance, > 0.

    Returns:
        The sum and the modulated norm, each of x's shape and dtype.

    Raises:
        ValueError: Shapes, devices or the set of arguments do not fit together.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `x`.

    Source: adaptive layer norm of DiT (Peebles and Xie, 2023), per frame as in Open-Sora 1.2.
    """
    rows: dict[str, _Row] = {"shift": shift, "scale": scale, "shift0": shift0, "scale0": scale0}
    if gate is not None:
        rows |= {"gate": gate, "gate0": gate0}
    elif gate0 is not None:
        raise ValueError("gate0 comes with gate: pass both or neither")
    check(x, select, **rows)
    if y.shape != x.shape or y.device != x.device or not y.is_floating_point():
        raise ValueError(
            f"y must be float {list(x.shape)} on {x.device} as x is, "
            f"got {y.dtype} {list(y.shape)} on {y.device}"
        )
    if not _forward.serves(x):  # one of the two ops may have a kernel where this one has none
        if gate is None:
            total = (x + y).to(x.dtype)
        else:
            total = gate_residual.gate_residual(x, y, gate, select=select, gate0=gate0)
        options = {"select": select, "shift0": shift0, "scale0": scale0}
        return total, layernorm_modulate.layernorm_modulate(total, shift, scale, **options, eps=eps)
    shift, scale = dense_rows(shift, x.dtype), dense_rows(scale, x.dtype)
    gate, gate0, shift0, scale0 = (
        row if row is None else dense_rows(row, x.dtype) for row in (gate, gate0, shift0, scale0)
    )
    others = (gate, shift, scale, select, gate0, shift0, scale0, eps)
    recorded = needs_grad(x, y, *others[:-1])
    run = _ResidualLayerNormModulate.apply if recorded else _forward
    total, normed = run(x.contiguous(), y.contiguous(), *others)
    return total, normed
