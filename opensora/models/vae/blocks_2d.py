"""Build the 2D VAE: residual, attention and resampling blocks under diffusers' parameter names."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models.vae.conv import Conv2d
from opensora.models.vae.norm import GroupNorm

# diffusers' GroupNorm epsilon in the VAEs; the temporal VAE has torch's 1e-5
EPS = 1e-6
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ResnetBlock2D(nn.Module):
    """Apply x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3)
        self.norm2 = GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = Conv2d(out_channels, out_channels, 3)
        self.conv_shortcut: Conv2d | None = None
        if in_channels != out_channels:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B, out_channels, H, W] for x [B, in_channels, H, W]."""
        y: Tensor = self.conv1(self.norm1(x))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        result: Tensor = self.conv2(self.norm2(y), shortcut)
        return result


def _rename_old_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Turn the attention names of older diffusers checkpoints into today's."""
    for old, new in _RENAMED.items():
        for leaf in ("weight", "bias"):
            if f"{prefix}{old}.{leaf}" in state_dict:
                state_dict[f"{prefix}{new}.{leaf}"] = state_dict.pop(f"{prefix}{old}.{leaf}")


class AttentionBlock2D(nn.Module):
    """Let every pixel attend to all pixels of its image, one head of full width."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=EPS, silu=False)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.register_load_state_dict_pre_hook(_rename_old_keys)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention(norm(x)), [B, C, H, W]."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out: Tensor = self.to_out[0](y)
        return x + out.transpose(1, 2).reshape(x.shape)


class MidBlock2D(nn.Module):
    """Apply a residual block, attention (where configured) and a residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        blocks = [AttentionBlock2D(channels, groups)] if attention else []
        self.attentions = nn.ModuleList(blocks)
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [B, C, H, W]."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Downsample2D(nn.Module):
    """Halve height and width (floor): a stride 2 convolution, zeros at the right and bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H // 2, W // 2]."""
        out: Tensor = self.conv(x)
        return out


class Upsample2D(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, 2H, 2W]."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class DownBlock2D(nn.Module):
    """Apply one encoder level: residual blocks, then the downsampler where there is one."""

    def __init__(self, widths: tuple[int, int], layers: int, groups: int, resample: bool) -> None:
        super().__init__()
        ins = (widths[0], *[widths[1]] * (layers - 1))
        self.resnets = nn.ModuleList(ResnetBlock2D(i, widths[1], groups) for i in ins)
        self.downsamplers = nn.ModuleList([Downsample2D(widths[1])] if resample else [])

    def forward(self, x: Tensor) -> Tensor:
        """Return the level's output."""
        for block in (*self.resnets, *self.downsamplers):
            x = block(x)
        return x


class UpBlock2D(nn.Module):
    """Apply one decoder level: residual blocks, then the upsampler where there is one."""

    def __init__(self, widths: tuple[int, int], layers: int, groups: int, resample: bool) -> None:
        super().__init__()
        ins = (widths[0], *[widths[1]] * (layers - 1))
        self.resnets = nn.ModuleList(ResnetBlock2D(i, widths[1], groups) for i in ins)
        self.upsamplers = nn.ModuleList([Upsample2D(widths[1])] if resample else [])

    def forward(self, x: Tensor) -> Tensor:
        """Return the level's output."""
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x
