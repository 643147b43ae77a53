"""Attend to tokens: self-attention with optional norms and rotary positions, and cross-attention.

B batch, N tokens, L text tokens, C channels, H heads, D = C / H head width. Parameter names are
the published ones. Source: Open-Sora 1.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.errors import UsageError

EPS = 1e-6  # of every norm in these models


class RMSNorm(nn.Module):
    """Normalise by the root mean square: weight * cast(x / sqrt(mean(x^2) + eps)).

    The norm is float32; it is rounded to x's dtype *before* the weight multiplies it.
    """

    def __init__(self, dim: int, eps: float = EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x's shape; its dtype, or the weight's where that is wider."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Hold the frequencies 10000 ** (-2i / D) of rotary position embedding.

    They are a parameter without gradient, `freqs` [D / 2], because published checkpoints have it.
    In a bfloat16 model frequencies, positions and angles are bfloat16, as published: the error
    of an angle grows with the position.
    """

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        steps = torch.arange(0, dim, 2, dtype=torch.float32)
        self.freqs = nn.Parameter(1.0 / theta ** (steps / dim), requires_grad=False)

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin [length, D] of the angles; neighbours 2i and 2i + 1 share one."""
        positions = torch.arange(length, device=self.freqs.device, dtype=self.freqs.dtype)
        angles = (positions[:, None] * self.freqs).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x's last axis by the angles of their position.

        out[2i] = x[2i] cos - x[2i+1] sin;  out[2i+1] = x[2i+1] cos + x[2i] sin

    Args:
        x: [..., N, D].
        table: cos and sin [N, D] from `RotaryEmbedding.table`.
    """
    cos, sin = table
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k' / sqrt(D)) v, [B, H, N, D]; rows that see nothing are zero.

    On a CPU, short rows go through batched matrix products, because the flash kernel's backward
    there pays per row. Forward and backward, D = 32, bfloat16, 2 threads of an idle machine: 320 x
    4 rows of 16 tokens 7 ms against 48; 1024 x 4 rows of 5, 8 against 17; 64 x 4 rows of 80 on 120
    masked keys 10 against 34. In float32 the backward loses; of the forward, rows of 5 gain (4.5 ms
    against 7.4) and rows of 16 do not.

    Args:
        q: [B, H, N, D], as `k` and `v` of L tokens.
        k: keys.
        v: values.
        mask: bool, broadcast to [B, H, N, L]; True where a key is seen. None: all are.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    longest = 128 if v.dtype == torch.bfloat16 else (0 if needs_grad else 32)
    if v.device.type != "cpu" or k.shape[-2] > longest:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q = q * q.shape[-1] ** -0.5
    if mask is None:
        return torch.matmul((q @ k.transpose(-1, -2)).softmax(-1), v)
    # The mask is a bias that the product adds: no further pass over the scores.
    rows = (*q.shape[:3], k.shape[-2])
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    scores = torch.baddbmm(
        bias.expand(rows).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(-1, -2)
    )
    out = torch.matmul(scores.view(rows).softmax(-1), v)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0)


class Attention(nn.Module):
    """Attend every token of a row to all of its row: proj(softmax(q k' / sqrt(D)) v).

    Args:
        dim: C.
        num_heads: H.
        qkv_bias: whether `qkv` [3C, C] has a bias; its output is split as (3, H, D), q first.
        qk_norm: RMSNorm q and k over D, one weight for all heads.
        qk_norm_legacy: rotate before that norm instead of after it (weights of Open-Sora 1.1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        qk_norm_legacy: bool = False,
    ) -> None:
        super().__init__()
        _check_heads("Attention", dim, num_heads)
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qk_norm_legacy = qk_norm_legacy
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return [B, N, C] for x [B, N, C]; `rotary` is the table of its N positions, or None."""
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        if rotary is not None and self.qk_norm_legacy:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None and not self.qk_norm_legacy:
            q, k = rotate(q, rotary), rotate(k, rotary)
        # Under autocast the norm's float32 weight widens q and k; v keeps the working dtype.
        out = attend(q.to(v.dtype), k.to(v.dtype), v)
        result: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))
        return result


class MultiHeadCrossAttention(nn.Module):
    """Attend the tokens of every sample to its own text, and to no other sample's.

    Args:
        d_model: C.
        num_heads: H. `q_linear` [C, C]; `kv_linear` [2C, C], k first; `proj` [C, C].
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        _check_heads("MultiHeadCrossAttention", d_model, num_heads)
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.q_linear = nn.Linear(d_model, d_model)
        self.kv_linear = nn.Linear(d_model, 2 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(
        self, x: Tensor, cond: Tensor, mask: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Return [B, N, C].

        Args:
            x: [B, N, C].
            cond: text [B, L, C], or packed [1, sum of lengths, C] if `mask` holds lengths.
            mask: bool [B, L], True where a token is seen; None: all are; or the B lengths of a
                packed `cond`. A sample that sees nothing gets zeros before `proj`.
        """
        if mask is not None and not isinstance(mask, Tensor):
            cond, mask = pad_packed(cond, mask)
        batch, tokens, channels = x.shape
        q = self.q_linear(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        kv = self.kv_linear(cond).view(batch, -1, 2, self.num_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, L, D]
        visible = None if mask is None else mask[:, None, None]  # [B, 1, 1, L]
        out = attend(q, k, v, visible)
        result: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))
        return result


def pad_packed(cond: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return text [B, max length, C] padded with zeros, and its bool mask [B, max length].

    Args:
        cond: [1, sum of lengths, C], the samples one after another.
        lengths: tokens of every sample.

    Raises:
        UsageError: the lengths do not add up.
    """
    if cond.ndim != 3 or cond.shape[0] != 1 or cond.shape[1] != sum(lengths):
        raise UsageError(
            f"packed text must be [1, {sum(lengths)}, C] for the lengths {list(lengths)}, "
            f"got {list(cond.shape)}"
        )
    padded = nn.utils.rnn.pad_sequence(cond[0].split(list(lengths)), batch_first=True)
    positions = torch.arange(padded.shape[1], device=cond.device)
    return padded, positions < torch.tensor(lengths, device=cond.device)[:, None]


def _check_heads(name: str, dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise UsageError(f"{name}: width {dim} is not a multiple of {num_heads} heads")
