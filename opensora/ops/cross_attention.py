"""Attend the tokens of every sample to its own text, which is any run of rows of one tensor.

    y = softmax(q k' / sqrt(D)) v, over the keys of the query's sample

Kernels: Triton on CUDA (`kernels/cross_attention.py`), C++ on CPU
(`csrc/cpu/cross_attention.cpp`). Used by every block of STDiT3; keys and
values depend on the text alone, so a caller may keep them for all steps of a clip.
Axes: B batch, N tokens, L rows of text, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops import _attention, _library
from opensora.ops._heads import describe
from opensora.ops._library import Op, needs_grad

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
WIDEST = 128  # D that the Triton kernels take


def reference(q: Tensor, kv: Tensor, starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Compute the op in plain PyTorch: pad the text, mask, attend."""
    rows, seen = _rows(kv, starts, lengths, longest)
    k, v = _padded(kv, rows).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, longest, D]
    y = _attention.attend(q.transpose(1, 2), k, v, seen[:, None, None])
    return y.transpose(1, 2).reshape(*q.shape[:2], q.shape[2:].numel()).contiguous()


def reference_backward(
    grad: Tensor, q: Tensor, kv: Tensor, starts: Tensor, lengths: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Return what `_backward` returns for `text`. With weights p of the softmax and dp = grad v':

    dv = p' grad, ds = p * (dp - sum(p * dp)) / sqrt(D), dq = ds k, dk = ds' q
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, seen = _rows(kv, starts, lengths, longest)
    k, v = _padded(kv.to(wide), rows).permute(2, 0, 3, 1, 4).unbind(0)
    queries = q.to(wide).transpose(1, 2)
    do = grad.to(wide).unflatten(-1, q.shape[2:]).transpose(1, 2)
    scale = q.shape[-1] ** -0.5
    scores = (queries @ k.mT * scale).masked_fill(~seen[:, None, None], float("-inf"))
    p = scores.softmax(-1).masked_fill(~seen[:, None, None], 0)  # NaN where a sample has no text
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dpadded = torch.stack((ds.mT @ queries, p.mT @ do)).permute(1, 3, 0, 2, 4)
    dkv = kv.new_zeros(kv.shape[0] + 1, *kv.shape[1:], dtype=wide)
    dkv = dkv.index_add(0, rows.flatten(), dpadded.flatten(0, 1))[:-1]
    dq = (ds @ k).transpose(1, 2).contiguous()
    return dq.to(q.dtype), dkv.to(kv.dtype).contiguous()


def _rows(kv: Tensor, starts: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return the rows of kv [B, longest] of every sample, L past its end, and where they are."""
    positions = torch.arange(longest, device=kv.device)
    seen = positions < lengths[:, None]
    return torch.where(seen, starts[:, None] + positions, kv.shape[0]), seen


def _padded(kv: Tensor, rows: Tensor) -> Tensor:
    """Return keys and values [B, longest, 2, H, D], zeros past the end of a sample."""
    return F.pad(kv, (0, 0, 0, 0, 0, 0, 0, 1))[rows]


def _reference_forward(
    q: Tensor, kv: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what `_forward` returns, its lse as NaN: `_reference_backward` needs none.

    Every text is padded to all rows of kv, for the longest is known on the device alone.
    """
    _, lse = _fake_forward(q)
    return reference(q, kv, starts, lengths, max(len(kv), 1)), lse.fill_(torch.nan)


def _reference_backward(grad: Tensor, q: Tensor, kv: Tensor, *others: Any) -> Any:
    """Compute what `_backward` returns, without y and lse."""
    starts, lengths, _, _, longest, text = others
    dq, dkv = reference_backward(grad, q, kv, starts, lengths, longest)
    return dq, dkv if text else dkv.new_empty(0)


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, width = q.shape
    y = q.new_empty(batch, tokens, heads * width)
    return y, q.new_empty(batch, heads, tokens, dtype=torch.float32)


def _fake_backward(grad: Tensor, q: Tensor, kv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    dkv = torch.empty_like(kv, memory_format=dense) if others[-1] else kv.new_empty(0)
    return torch.empty_like(q, memory_format=dense), dkv


# lse [B, H, N] float32: log2 of the sum of exp(score); -inf where a sample has no text.
_forward = Op(
    "cross_attention_forward(Tensor q, Tensor kv, Tensor starts, Tensor lengths) "
    "-> (Tensor y, Tensor lse)",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=_reference_forward,
    cuda="opensora.kernels.cross_attention:forward",
)

# dkv is empty unless `text` asks for it.
_backward = Op(
    "cross_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor starts, Tensor lengths, "
    "Tensor y, Tensor lse, SymInt longest, bool text) -> (Tensor dq, Tensor dkv)",
    fake=_fake_backward,
    dtypes=DTYPES,
    reference=_reference_backward,
    cuda="opensora.kernels.cross_attention:backward",
)


def _without_lse(longest: int, *args: Any) -> Any:
    return _forward(*args)[0]


class _CrossAttention(torch.autograd.Function):
    """Save inputs, y and the log-sum-exp; backward computes the weights of the softmax again."""

    @staticmethod
    def forward(ctx: Any, longest: int, *args: Any) -> Tensor:
        y, lse = _forward(*args)
        ctx.save_for_backward(*args, y, lse)
        ctx.longest = longest
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        text = ctx.needs_input_grad[2]
        dq, dkv = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest, text)
        return None, dq, dkv if text else None, None, None


def cross_attention(
    q: Tensor, kv: Tensor, starts: Tensor, lengths: Tensor, *, longest: int
) -> Tensor:
    """Attend every token to the text of its sample: `softmax(q k' / sqrt(D)) v`.

    Sums and softmax are float32. Deterministic. Differentiable once, in `q` and `kv`. Nothing is
    read on the host. Text padded to [B, L', 2, H, D] is `kv.flatten(0, 1)` with starts at the
    multiples of L'; text packed without padding starts at the sums of the lengths before it.

    Args:
        q: Queries [B, N, H, D], floating point; any strides, a kernel copies it unless D is dense.
            Triton takes D up to 128, exactly fitting where it is 2^i or 2^i + 2^j.
        kv: Keys and values [L, 2, H, D], k first; of q's dtype, strides likewise.
        starts: int32 [B], the first row of kv of each sample's text. Samples may share rows only
            where kv takes no gradient; rows of no sample get a gradient of zero.
        lengths: int32 [B], the number of those rows. A sample without text gets zeros. The values
            of both are not checked: `starts + lengths` must be at most L.
        longest: At least the largest length, >= 1. The reference pads to it; kernels only choose
            a grid by it.

    Returns:
        Tensor [B, N, H * D] of q's dtype, dense.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `q`.

    Source: flash attention (Dao et al., 2022); packed text as in Open-Sora 1.2.
    """
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q must be float [B, N, H, D], got {describe(q)}")
    if kv.dim() != 4 or kv.shape[1:] != (2, *q.shape[2:]) or kv.dtype != q.dtype:
        expected = f"{q.dtype} [L, 2, H, D] = [L, 2, {q.shape[2]}, {q.shape[3]}]"
        raise ValueError(f"kv must be {expected}, got {describe(kv)}")
    for name, numbers in (("starts", starts), ("lengths", lengths)):
        if numbers.dtype != torch.int32 or numbers.shape != q.shape[:1]:
            expected = f"int32 [B = {q.shape[0]}]"
            raise ValueError(f"{name} must be {expected}, got {describe(numbers)}")
    if not q.device == kv.device == starts.device == lengths.device:
        found = f"{q.device}, {kv.device}, {starts.device}, {lengths.device}"
        raise ValueError(f"q, kv, starts, lengths must share a device, got {found}")
    if longest < 1:
        raise ValueError(f"longest must be 1 or more, got {longest}")
    too_wide = q.shape[-1] > WIDEST and _forward.kernel(q.device.type) != "C++"
    left = too_wide or _attention.library_is_faster(q)
    if (left and _library.mode != "require") or not _forward.serves(
        q
    ):  # in mode "require" the launcher raises
        return reference(q, kv, starts, lengths, longest)
    q, kv = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv))
    starts, lengths = starts.contiguous(), lengths.contiguous()
    run = _CrossAttention.apply if needs_grad(q, kv) else _without_lse
    y: Tensor = run(longest, q, kv, starts, lengths)
    return y
