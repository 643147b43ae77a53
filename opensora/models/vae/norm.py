"""Normalise groups of channels: the norm of both VAEs."""

from __future__ import annotations

from torch import Tensor, nn

from opensora.functional import groupnorm_silu


class GroupNorm(nn.GroupNorm):
    """Normalise, scale and shift groups of channels, and apply SiLU, in one op.

    Args:
        groups: divides `channels`.
        channels: C.
        eps: added to the variance.
        silu: whether SiLU follows.
    """

    def __init__(self, groups: int, channels: int, *, eps: float = 1e-5, silu: bool = True) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """Return x's shape, [B, C, H, W] or [B, C, T, H, W]."""
        return groupnorm_silu(
            x, self.weight, self.bias, self.num_groups, eps=self.eps, silu=self.silu
        )
