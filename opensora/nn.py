"""Layers that the transformers share. Parameter names are the published ones.

B batch, N tokens, L text tokens, C channels, H heads, D = C / H head width, T frames, S patches
per frame. Source: Open-Sora 1.2; adaLN after DiT and PixArt-alpha.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.attention import (
    EPS,
    Attention,
    MultiHeadCrossAttention,
    PackedText,
    RMSNorm,
    RotaryEmbedding,
    pack_text,
)
from opensora.embedders import (
    CaptionEmbedder,
    PositionEmbedding2D,
    SizeEmbedder,
    TimestepEmbedder,
    timestep_embedding,
)
from opensora.functional import layernorm_modulate, patchify
from opensora.linear import Linear
from opensora.ops._attention import attend, rotate

__all__ = [
    "EPS",
    "Attention",
    "CaptionEmbedder",
    "Mlp",
    "MultiHeadCrossAttention",
    "PackedText",
    "PatchEmbed3D",
    "PositionEmbedding2D",
    "RMSNorm",
    "RotaryEmbedding",
    "SizeEmbedder",
    "T2IFinalLayer",
    "TimestepEmbedder",
    "attend",
    "modulate",
    "pack_text",
    "rotate",
    "t2i_modulate",
    "timestep_embedding",
]


def t2i_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift in x's dtype; all shapes broadcast."""
    return x * (1 + scale) + shift


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LN(x) * (scale + 1) + shift with the norm in float32: DiT's and Latte's form.

    Args:
        x: [B, N, C].
        shift: [B, C], as `scale`.
        scale: deviation of the factor from one.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)
    return normed * (scale[:, None] + 1) + shift[:, None]


class Mlp(nn.Module):
    """Compute fc2(GELU_tanh(fc1(x))).

    Args:
        dim: C.
        hidden: width between the two linears.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., C] for x [..., C]."""
        result: Tensor = self.fc2(self.fc1(x, gelu=True))
        return result


class PatchEmbed3D(nn.Module):
    """Map patches of a video to tokens with one linear map, stored as a Conv3d `proj`.

    Args:
        patch_size: (frames, rows, columns) of a patch.
        in_channels: channels of the video.
        dim: C.
    """

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return tokens [B, T' * H' * W', C], frames slowest, for x [B, in, T, H, W].

        Sizes that are no multiple of the patch are padded with zeros at their end.

        Args:
            x: the video.
            positions: codes [1, H' * W', C] that are added to the patches of every frame.
        """
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None
        if positions is None:
            rows, columns = (
                -(-n // p) for n, p in zip(x.shape[3:], self.patch_size[1:], strict=True)
            )
            positions = weight.new_zeros(rows * columns, weight.shape[0])
        return patchify(x, weight, bias, positions)


class T2IFinalLayer(nn.Module):
    """Map tokens to the values of their patches: linear(LN(x) * (1 + scale) + shift).

    (shift, scale) = scale_shift_table + t. Frames that `x_mask` leaves out are modulated by t
    *and then*, on top of that result, normalised and modulated by t0: published behaviour.

    Args:
        dim: C.
        patch_volume: voxels of a patch.
        out_channels: channels of the result.
    """

    def __init__(self, dim: int, patch_volume: int, out_channels: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.linear = nn.Linear(dim, patch_volume * out_channels)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
    ) -> Tensor:
        """Return [B, N, patch_volume * out_channels].

        Args:
            x: [B, N, C].
            t: [B, C], embedding of the timestep.
            x_mask: bool [B, T]: True frames use t. None: all do.
            t0: [B, C], embedding of timestep zero; comes with `x_mask`.
        """
        shift, scale = (self.scale_shift_table[None] + t[:, None]).unbind(1)
        x = layernorm_modulate(x, shift, scale, eps=EPS)
        if x_mask is not None and t0 is not None:
            shift0, scale0 = (self.scale_shift_table[None] + t0[:, None]).unbind(1)
            again = layernorm_modulate(x, shift0, scale0, eps=EPS)
            frames = x_mask.shape[1]
            chosen = x_mask.repeat_interleave(x.shape[1] // frames, dim=1)[..., None]  # [B, N, 1]
            x = torch.where(chosen, x, again)
        result: Tensor = self.linear(x)
        return result
