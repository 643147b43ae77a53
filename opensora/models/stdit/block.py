"""One block of STDiT3: self-attention over space or time, cross-attention to the text, an MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora.functional import layernorm_modulate
from opensora.nn import EPS, Attention, Mlp, MultiHeadCrossAttention


class STDiT3Block(nn.Module):
    """Update tokens by three residual branches, two of them modulated and gated by the timestep.

        (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = scale_shift_table + t
        x = x + gate_a * attn(LN(x) * (1 + scale_a) + shift_a)
        x = x + cross_attn(x, y)
        x = x + gate_m * mlp(LN(x) * (1 + scale_m) + shift_m)

    The forward takes tensors and plain numbers and reads no tensor on the host, so
    `block.compile()` gives one graph.

    Args:
        hidden_size: C.
        num_heads: H.
        mlp_ratio: hidden width of the MLP over C.
        temporal: attend each patch over the frames (rotary positions) instead of each frame over
            its patches.
        qk_norm: RMSNorm queries and keys of the self-attention.
        drop_path: chance to skip a gated branch for a sample, in training.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        temporal: bool = False,
        qk_norm: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.temporal, self.drop_path = temporal, drop_path
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.cross_attn = MultiHeadCrossAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        frames: int,
        *,
        y_mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return [B, N, C].

        Args:
            x: tokens [B, N = T * S, C], frames slowest.
            y: text [B, L, C].
            t: [B, 6 * C], from the timestep.
            frames: T.
            y_mask: bool [B, L], True where a text token is seen; None: all are.
            x_mask: bool [B, T]; False frames are modulated and gated by t0. None: none is.
            t0: [B, 6 * C], from timestep zero; comes with `x_mask`.
            rotary: cos and sin [T, D] of the frames' positions, for a temporal block.
        """
        batch, tokens, channels = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(t)
        shift_a0 = scale_a0 = gate_a0 = shift_m0 = scale_m0 = gate_m0 = None
        if x_mask is not None and t0 is not None:
            shift_a0, scale_a0, gate_a0, shift_m0, scale_m0, gate_m0 = self._modulation(t0)
        h = layernorm_modulate(
            x, shift_a, scale_a, select=x_mask, shift0=shift_a0, scale0=scale_a0, eps=EPS
        )
        by_frame = h.view(batch, frames, tokens // frames, channels)
        if self.temporal:
            by_patch = by_frame.transpose(1, 2).reshape(-1, frames, channels)
            h = self.attn(by_patch, rotary).view(batch, -1, frames, channels).transpose(1, 2)
        else:
            h = self.attn(by_frame.flatten(0, 1))
        x = x + self._dropped(_gated(h.reshape(x.shape), gate_a, x_mask, gate_a0))
        x = x + self.cross_attn(x, y, y_mask)
        h = layernorm_modulate(
            x, shift_m, scale_m, select=x_mask, shift0=shift_m0, scale0=scale_m0, eps=EPS
        )
        return x + self._dropped(_gated(self.mlp(h), gate_m, x_mask, gate_m0))

    def _modulation(self, t: Tensor) -> tuple[Tensor, ...]:
        """Return six [B, C] of `scale_shift_table + t`."""
        return (self.scale_shift_table[None] + t.view(t.shape[0], 6, -1)).unbind(1)

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * kept.to(branch.dtype) / (1 - self.drop_path)


def _gated(x: Tensor, gate: Tensor, x_mask: Tensor | None, gate0: Tensor | None) -> Tensor:
    """Return gate * x [B, N, C] with the gate of each frame: gate where x_mask, else gate0."""
    if x_mask is None or gate0 is None:
        return gate[:, None] * x
    chosen = torch.where(x_mask[:, :, None], gate[:, None], gate0[:, None])  # [B, T, C]
    return (chosen[:, :, None] * x.view(*chosen.shape[:2], -1, x.shape[-1])).flatten(1, 2)
