"""Attend the tokens of each frame to one another, reading packed queries, keys and values.

    y = softmax(norm(q) norm(k)' / sqrt(D)) v,  norm(x) = weight * x / sqrt(mean(x^2) + eps)

Kernels: Triton on CUDA (`kernels/spatial_attention.py`), C++ on CPU
(`csrc/cpu/spatial_attention.cpp`). Used by STDiT3's spatial blocks, where the norms are on.
Axes: B batch, T frames, S patches per frame, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops import _attention, _library
from opensora.ops._heads import check, describe, prepare, prepare_backward
from opensora.ops._library import Op, needs_grad

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
WIDEST = 128  # D that the Triton kernels take
_UNTURNED = (None, None, False)  # no rotary positions: frames know no order of patches


def reference(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> Tensor:
    """Compute the op in plain PyTorch: norms with float32 statistics, then attention."""
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2).unbind(0)  # [B*T, H, S, D]
    q, k = prepare(q, q_weight, *_UNTURNED, eps), prepare(k, k_weight, *_UNTURNED, eps)
    y = _attention.attend(q.to(v.dtype), k.to(v.dtype), v)
    return y.transpose(1, 2).reshape(*qkv.shape[:3], qkv.shape[4:].numel()).contiguous()


def reference_backward(
    grad: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return what `_backward` returns. With weights p of the softmax and dp = grad v':

    dv = p' grad, ds = p * (dp - sum(p * dp)) / sqrt(D), dq = ds k, dk = ds' q,
    and through the norms as in `prepare_backward`. q and k are rounded as in the forward, products
    are float32.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    raw_q, raw_k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # [B, T, H, S, D]
    q = prepare(raw_q, q_weight, *_UNTURNED, eps).to(qkv.dtype).to(wide)
    k = prepare(raw_k, k_weight, *_UNTURNED, eps).to(qkv.dtype).to(wide)
    v = v.to(wide)
    do = grad.to(wide).unflatten(-1, qkv.shape[-2:]).transpose(2, 3)
    scale = qkv.shape[-1] ** -0.5
    p = (q @ k.mT * scale).softmax(-1)
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq, dq_weight = prepare_backward(ds @ k, raw_q, q_weight, *_UNTURNED, eps)
    dk, dk_weight = prepare_backward(ds.mT @ q, raw_k, k_weight, *_UNTURNED, eps)
    dqkv = torch.stack((dq, dk, p.mT @ do)).permute(1, 2, 4, 0, 3, 5)
    dweights = torch.stack((dq_weight, dk_weight)) if q_weight is not None else dq.new_empty(0, 0)
    return dqkv.to(qkv.dtype).contiguous(), dweights


def _reference_forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Compute what `_forward` returns, its statistics as NaN: `_reference_backward` needs none."""
    _, stats = _fake_forward(*args)
    return reference(*args), stats.fill_(torch.nan)


def _reference_backward(
    grad: Tensor, qkv: Tensor, q_weight: Any, k_weight: Any, y: Tensor, stats: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute what `_backward` returns, without y and its statistics."""
    return reference_backward(grad, qkv, q_weight, k_weight, eps)


def _fake_forward(qkv: Tensor, q_weight: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    (batch, frames, tokens), (heads, width) = qkv.shape[:3], qkv.shape[4:]
    stats = (1 if q_weight is None else 3, batch, frames, heads, tokens)
    y = qkv.new_empty(batch, frames, tokens, heads * width)
    return y, qkv.new_empty(stats, dtype=torch.float32)


def _fake_backward(grad: Tensor, qkv: Tensor, q_weight: Tensor | None, *_: Any) -> Any:
    shape = (0, 0) if q_weight is None else (2, qkv.shape[-1])
    dweights = qkv.new_empty(shape, dtype=torch.float32)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), dweights


# stats [1 or 3, B, T, H, S] float32: log2 of the sum of exp(score); with norms 1 / rms of q and k.
_forward = Op(
    "spatial_attention_forward(Tensor qkv, Tensor? q_weight, Tensor? k_weight, float eps) "
    "-> (Tensor y, Tensor stats)",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=_reference_forward,
    cuda="opensora.kernels.spatial_attention:forward",
)

# dweights [2, D] float32: the gradients of q_weight and k_weight; without norms [0, 0].
_backward = Op(
    "spatial_attention_backward(Tensor grad, Tensor qkv, Tensor? q_weight, Tensor? k_weight, "
    "Tensor y, Tensor stats, float eps) -> (Tensor dqkv, Tensor dweights)",
    fake=_fake_backward,
    dtypes=DTYPES,
    reference=_reference_backward,
    cuda="opensora.kernels.spatial_attention:backward",
)


def _without_stats(*args: Any) -> Any:
    return _forward(*args)[0]


class _SpatialAttention(torch.autograd.Function):
    """Save inputs, y and the statistics; backward computes the weights of the softmax again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, stats = _forward(*args)
        ctx.save_for_backward(*args[:3], y, stats)
        ctx.eps = args[3]
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint hands them out a single time
        _, q_weight, k_weight, *_ = saved
        dqkv, dweights = _backward(grad.contiguous(), *saved, ctx.eps)
        if q_weight is None:
            return dqkv, None, None, None
        return dqkv, dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype), None


def spatial_attention(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Attend every token to all tokens of its frame: `softmax(q k' / sqrt(D)) v`.

    With weights q and k are RMS-normalised over D first. The reference rounds their norms to
    qkv's dtype before and after the weight, and so does C++; Triton multiplies both weights into
    one side and rounds that once. Sums and softmax are float32. Deterministic. Differentiable
    once, in all tensors.

    Args:
        qkv: [B, T, S, 3, H, D], q first, floating point; any strides, a kernel copies it unless D
            is dense. Triton takes D up to 128, exactly fitting where it is 2^i or 2^i + 2^j.
        q_weight: [D], any floating dtype; None: no norm.
        k_weight: Like `q_weight`; given exactly when it is.
        eps: Added to the mean square, > 0.

    Returns:
        Tensor [B, T, S, H * D] of qkv's dtype, dense.

    Raises:
        ValueError: Shapes, devices or the set of arguments do not fit together.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `qkv`.

    Source: flash attention (Dao et al., 2022), tiled for the layout that one linear layer writes.
    """
    if qkv.dim() != 6 or qkv.shape[3] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be float [B, T, S, 3, H, D], got {describe(qkv)}")
    check(qkv, q_weight, k_weight, None, 0)
    too_wide = qkv.shape[-1] > WIDEST and _forward.kernel(qkv.device.type) != "C++"
    left = too_wide or _attention.library_is_faster(qkv)
    if (left and _library.mode != "require") or not _forward.serves(
        qkv
    ):  # in mode "require" the launcher raises
        return reference(qkv, q_weight, k_weight, eps)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    if q_weight is not None and k_weight is not None:
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    recorded = needs_grad(qkv, q_weight, k_weight)
    run = _SpatialAttention.apply if recorded else _without_stats
    y: Tensor = run(qkv, q_weight, k_weight, eps)
    return y
