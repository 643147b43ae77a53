"""Attend every patch over the frames, reading packed queries, keys and values where they lie.

    y = softmax(q k' / sqrt(D)) v,  q = rotate(q / rms(q) * q_weight), k likewise

Kernels: Triton on CUDA (`kernels/temporal_attention.py`), and there, where `OPENSORA_CUDA=c++` asks
for it, `csrc/cuda/temporal_attention.cu`; C++ on CPU (`csrc/cpu/temporal_attention.cpp`). Used by
STDiT3's temporal blocks.
Axes: B batch, T frames, S patches per frame, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops import _attention, _heads
from opensora.ops._library import Op, needs_grad

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
_Row = Tensor | None  # a weight [D], or a table [T, D]


def reference(
    qkv: Tensor, q_weight: _Row, k_weight: _Row, cos: _Row, sin: _Row, eps: float
) -> Tensor:
    """Compute the op in plain PyTorch: `Attention` without its projections, on rows of frames."""
    batch, frames, patches, _, heads, width = qkv.shape
    rows = qkv.permute(3, 0, 2, 4, 1, 5).reshape(3, batch * patches, heads, frames, width)
    q, k, v = rows.unbind(0)
    q = _heads.prepare(q, q_weight, cos, sin, False, eps).to(qkv.dtype)
    k = _heads.prepare(k, k_weight, cos, sin, False, eps).to(qkv.dtype)
    y = _attention.attend(q, k, v).view(batch, patches, heads, frames, width)
    y = y.permute(0, 3, 1, 2, 4).reshape(batch, frames, patches, heads * width)
    return y.contiguous()


def reference_backward(
    grad: Tensor,
    qkv: Tensor,
    q_weight: _Row,
    k_weight: _Row,
    cos: _Row,
    sin: _Row,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return what `_backward` returns. With p = softmax(x), x = q k' / sqrt(D) and dp = grad v':

    dv = p' grad, ds = p * (dp - sum(p * dp)) / sqrt(D), dq = ds k, dk = ds' q,
    and through rotation and norm as in `_heads.prepare_backward`. q and k are rounded as in the
    forward, products are float32.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    raw_q, raw_k, v = qkv.permute(3, 0, 2, 4, 1, 5).unbind(0)  # [B, S, H, T, D]
    do = grad.to(wide).unflatten(-1, qkv.shape[-2:]).permute(0, 2, 3, 1, 4)
    q = _heads.prepare(raw_q, q_weight, cos, sin, False, eps).to(qkv.dtype).to(wide)
    k = _heads.prepare(raw_k, k_weight, cos, sin, False, eps).to(qkv.dtype).to(wide)
    v = v.to(wide)
    scale = qkv.shape[-1] ** -0.5
    p = (q @ k.mT * scale).softmax(-1)
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq, dq_weight = _heads.prepare_backward(ds @ k, raw_q, q_weight, cos, sin, False, eps)
    dk, dk_weight = _heads.prepare_backward(ds.mT @ q, raw_k, k_weight, cos, sin, False, eps)
    dqkv = torch.stack((dq, dk, p.mT @ do)).permute(1, 4, 2, 0, 3, 5)
    return dqkv.to(qkv.dtype).contiguous(), torch.stack((dq_weight, dk_weight))


def _fake_forward(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])


def _fake_backward(grad: Tensor, qkv: Tensor, q_weight: _Row, *_: Any) -> Any:
    dweights = qkv.new_empty(2, 0 if q_weight is None else qkv.shape[-1], dtype=torch.float32)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), dweights


def _native(qkv: Tensor, *others: Any) -> tuple[Any, ...] | None:
    """Return the arguments of the kernel in C++, or None where it does not take them."""
    frames = 178 if qkv.dtype == torch.float32 else 256  # what fits into sm_80's shared memory
    strides = all(s * qkv.element_size() % 16 == 0 for s in qkv.stride()[:3])
    fits = _heads.takes_native(qkv, others[2:4]) and qkv.shape[1] <= frames and strides
    return (qkv, *others) if fits else None


_ARGUMENTS = "Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps"
_forward = Op(
    f"temporal_attention_forward({_ARGUMENTS}) -> Tensor",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=reference,
    cuda="opensora.kernels.temporal_attention:forward",
    native=_native,
)
# dweights [2, D] float32: the gradients of q_weight and k_weight; [2, 0] without them.
_backward = Op(
    f"temporal_attention_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor dqkv, Tensor dweights)",
    fake=_fake_backward,
    dtypes=DTYPES,
    reference=reference_backward,
    cuda="opensora.kernels.temporal_attention:backward",
)


class _TemporalAttention(torch.autograd.Function):
    """Save the inputs and nothing else: backward computes the softmax again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:5])
        ctx.eps = args[5]
        y: Tensor = _forward(*args)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint hands them out a single time
        q_weight = saved[1]
        dqkv, dweights = _backward(grad.contiguous(), *saved, ctx.eps)
        if q_weight is None:
            return dqkv, *[None] * 5
        return dqkv, *dweights.to(q_weight.dtype).unbind(0), *[None] * 3


def temporal_attention(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Attend each patch, in each head, to itself in all frames.

    Queries and keys are normalised as in `RMSNorm`, rotated by their frame and rounded to qkv's
    dtype; so are the weights of the softmax. Products and sums are float32. Deterministic.
    Differentiable once, in `qkv` and both weights. In kernels, up to 8 frames, a value that is not
    finite may reach the patches beside its own.

    Args:
        qkv: [B, T, S, 3, H, D], queries first, floating point; no copy where the last three
            dimensions are dense, whatever the strides of the others.
        q_weight: [D], any floating dtype; None, like `k_weight`: no norm.
        k_weight: [D], of the same dtype.
        rotary: cos and sin [T, D] of the frames, without gradient, columns 2i and 2i + 1 equal as
            in `RotaryEmbedding.table` (kernels read one of them); None: no rotation.
        eps: added to the mean square of queries and keys, > 0.

    Returns:
        Dense tensor [B, T, S, H * D] of qkv's dtype.

    Raises:
        ValueError: shapes, devices or dtypes do not fit together.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `qkv`.

    Source: temporal attention of Open-Sora 1.2.
    """
    if qkv.dim() != 6 or qkv.shape[3] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be float [B, T, S, 3, H, D], got {_heads.describe(qkv)}")
    _heads.check(qkv, q_weight, k_weight, rotary, qkv.shape[1])
    if not _forward.serves(qkv):
        cos, sin = rotary or (None, None)
        return reference(qkv, q_weight, k_weight, cos, sin, eps)
    if q_weight is not None and k_weight is not None:
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    heads, width = qkv.shape[-2:]
    if qkv.stride()[3:] != (heads * width, width, 1):
        qkv = qkv.contiguous()
    run = _TemporalAttention.apply if needs_grad(qkv, q_weight, k_weight) else _forward
    y: Tensor = run(qkv, q_weight, k_weight, *_heads.dense_table(rotary), eps)
    return y
