"""Attend to tokens: self-attention with optional norms and rotary positions, and cross-attention.

B batch, N tokens, T frames, S patches per frame, L text tokens, R rows of packed text, C channels,
H heads, D = C / H head width. Parameter names are the published ones. Source: Open-Sora 1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.distributed.sequence import Sequence as Ranks
from opensora.errors import UsageError
from opensora.functional import (
    cross_attention,
    qk_norm_rope,
    spatial_attention,
    temporal_attention,
)
from opensora.linear import Linear

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
        # Whoever unfreezes a whole model does not mean these.
        freqs = self.freqs.detach()
        angles = (positions[:, None] * freqs).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Attend every token to all of its row: proj(softmax(q k' / sqrt(D)) v).

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
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        *,
        temporal: bool = False,
        sequence: Ranks | None = None,
        length: int = 0,
    ) -> Tensor:
        """Return x's shape.

        Args:
            x: [B, N, C], rows of tokens; or [B, T, S, C], rows of S patches.
            rotary: cos and sin [row length, D] of the positions in a row; None: no rotation.
            temporal: the rows of [B, T, S, C] are the T frames of each patch.
            sequence: ranks that each hold a part [B, N / n, C] of the tokens and here attend to
                all of them, some heads each (Ulysses).
            length: N, with `sequence`.
        """
        frames = x if x.ndim == 4 else x[:, None]
        qkv = self.qkv(frames).unflatten(-1, (3, self.num_heads, self.head_dim))
        if sequence is not None:
            qkv = sequence.heads(qkv[:, 0], length)[:, None]
        weights: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            weights = (self.q_norm.weight, self.k_norm.weight)
        if rotary is not None and (self.qk_norm_legacy or not temporal):
            at = -5 if temporal else -4
            qkv = qk_norm_rope(
                qkv, *weights, rotary, position_dim=at, legacy=self.qk_norm_legacy, eps=EPS
            )
            weights, rotary = (None, None), None
        if temporal:
            y = temporal_attention(qkv, *weights, rotary, eps=EPS)
        else:
            y = spatial_attention(qkv, *weights, eps=EPS)
        if sequence is not None:
            parts = y[:, 0].unflatten(-1, (-1, self.head_dim))
            y = sequence.tokens(parts, self.num_heads)
        result: Tensor = self.proj(y.reshape(x.shape))
        return result


class PackedText(NamedTuple):
    """Hold the text of all samples, each in a run of rows.

    Attributes:
        states: [R, C].
        starts: int32 [B], the first row of each sample.
        lengths: int32 [B], the rows of each sample; rows of no sample are seen by nobody.
        longest: at least the largest length, 1 or more.
        keys: keys and values [R, 2, H, D] of one block, if they are known already.
    """

    states: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    keys: Tensor | None = None


def pack_text(cond: Tensor, mask: Tensor | Sequence[int] | None = None) -> PackedText:
    """Lay the text of a batch out without padding. Nothing is read on the host.

    Args:
        cond: text [B, L, C], or packed already, [1, sum of lengths, C], if `mask` holds lengths.
        mask: bool [B, L], True where a token is seen; None: all are; or the B lengths.

    Raises:
        UsageError: the lengths do not add up.
    """
    device = cond.device
    if mask is not None and not isinstance(mask, Tensor):
        if cond.ndim != 3 or cond.shape[0] != 1 or cond.shape[1] != sum(mask):
            raise UsageError(
                f"packed text must be [1, {sum(mask)}, C] for the lengths {list(mask)}, "
                f"got {list(cond.shape)}"
            )
        rows = [[0, *accumulate(mask)][: len(mask)], list(mask)]
        starts, lengths = torch.tensor(rows, dtype=torch.int32, device=device).unbind(0)
        return PackedText(cond[0], starts, lengths, max([1, *mask]))
    batch, longest = cond.shape[:2]
    starts = torch.arange(batch, dtype=torch.int32, device=device) * longest
    if mask is None:
        lengths = torch.full_like(starts, longest)
    else:
        # Tokens that nobody sees go to the end of their sample; the others keep their order.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        cond = cond.gather(1, order[..., None].expand_as(cond))
        lengths = mask.sum(1, dtype=torch.int32)
    return PackedText(cond.flatten(0, 1), starts, lengths, longest)


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
        self.q_linear = Linear(d_model, d_model)
        self.kv_linear = Linear(d_model, 2 * d_model)
        self.proj = Linear(d_model, d_model)

    def keys(self, text: PackedText) -> Tensor:
        """Return the keys and values [R, 2, H, D] of a text; they do not depend on `x`."""
        kv: Tensor = self.kv_linear(text.states)
        return kv.view(-1, 2, self.num_heads, self.head_dim)

    def forward(
        self,
        x: Tensor,
        cond: Tensor | PackedText,
        mask: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Return [B, N, C]. A sample that sees no text gets zeros before `proj`.

        Args:
            x: [B, N, C].
            cond: text, packed or as `pack_text` takes it together with `mask`.
            mask: see `pack_text`.
        """
        text = cond if isinstance(cond, PackedText) else pack_text(cond, mask)
        kv = self.keys(text) if text.keys is None else text.keys
        q = self.q_linear(x).unflatten(-1, (self.num_heads, self.head_dim))
        y = cross_attention(q, kv, text.starts, text.lengths, longest=text.longest)
        result: Tensor = self.proj(y)
        return result


def _check_heads(name: str, dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise UsageError(f"{name}: width {dim} is not a multiple of {num_heads} heads")
