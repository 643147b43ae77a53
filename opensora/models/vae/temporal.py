"""Compress the time axis of per-frame latents: the causal 3D VAE of Open-Sora 1.2.

Height and width never change. Parameter names are the published ones: `block_res_blocks` and
`conv_blocks` are indexed by level, also in the decoder, which runs them from the last to the first.
Source: the published checkpoint hpcai-tech/OpenSora-VAE-v1.2; the layout follows MAGVIT-v2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from opensora.checkpoint import PretrainedMixin
from opensora.errors import UsageError
from opensora.models.config_fields import read_fields
from opensora.models.vae.conv import CausalConv3d
from opensora.models.vae.norm import GroupNorm
from opensora.models.vae.posterior import Posterior


@dataclasses.dataclass(frozen=True)
class VAETemporalConfig:
    """Describe a temporal VAE; the defaults are the published one's.

    Level i has width filters * channel_multipliers[i]; between levels i and i + 1 the number of
    frames halves where temporal_downsample[i] is true.
    """

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    def __post_init__(self) -> None:
        """Check that the levels fit each other."""
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise UsageError(
                f"VAETemporalConfig: temporal_downsample has {len(self.temporal_downsample)} "
                f"entries, expected {len(self.channel_multipliers) - 1}, one between two of the "
                f"{len(self.channel_multipliers)} channel_multipliers"
            )
        if any(width % self.num_groups for width in self.widths):
            raise UsageError(
                f"VAETemporalConfig: num_groups {self.num_groups} does not divide every width "
                f"{self.widths} (filters {self.filters} x channel_multipliers)"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of every level."""
        return tuple(self.filters * m for m in self.channel_multipliers)

    @property
    def temporal_factor(self) -> int:
        """Return how many frames one latent frame covers."""
        return int(2 ** sum(self.temporal_downsample))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VAETemporalConfig:
        """Read the content of a config.json or of `to_dict`."""
        return cls(**read_fields(cls, data, ignored=("from_pretrained",)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        data = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


class ResBlock(nn.Module):
    """Apply x + conv(silu(norm(conv(silu(norm(x)))))), 1x1x1 shortcut where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        self.conv3: CausalConv3d | None = None
        if in_channels != out_channels:
            self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B, out_channels, T, H, W]."""
        y: Tensor = self.conv1(self.norm1(x))
        shortcut = x if self.conv3 is None else self.conv3(x)
        result: Tensor = self.conv2(self.norm2(y), shortcut)
        return result


def _res_blocks(in_channels: int, out_channels: int, config: VAETemporalConfig) -> nn.ModuleList:
    ins = (in_channels, *[out_channels] * (config.num_res_blocks - 1))
    return nn.ModuleList(ResBlock(i, out_channels, config.num_groups) for i in ins)


class Encoder(nn.Module):
    """Map x [B, in_out, T, H, W] to [B, 2 * latent_embed, T / f, H, W]; T a multiple of f."""

    def __init__(self, config: VAETemporalConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv3d(config.in_out_channels, widths[0], 3, bias=False)
        ins = (widths[0], *widths[:-1])
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(i, o, config) for i, o in zip(ins, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, strides=(2, 1, 1)) if halve else nn.Identity()
            for width, halve in zip(widths[:-1], config.temporal_downsample, strict=True)
        )
        self.res_blocks = _res_blocks(widths[-1], widths[-1], config)
        self.norm1 = GroupNorm(config.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the moments before the quantising convolution."""
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            if level > 0:
                x = self.conv_blocks[level - 1](x)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x)
        for block in self.res_blocks:
            x = block(x)
        out: Tensor = self.conv2(self.norm1(x))
        return out


class Decoder(nn.Module):
    """Map z [B, latent_embed, T', H, W] to [B, in_out, T' * f, H, W]."""

    def __init__(self, config: VAETemporalConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv1 = CausalConv3d(config.latent_embed_dim, widths[-1], 3)
        self.res_blocks = _res_blocks(widths[-1], widths[-1], config)
        ins = (*widths[1:], widths[-1])
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(i, o, config) for i, o in zip(ins, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if double else nn.Identity()
            for width, double in zip(widths[1:], config.temporal_downsample, strict=True)
        )
        self.double_before = config.temporal_downsample
        self.norm1 = GroupNorm(config.num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """Return the frames, those of the encoder's front padding included."""
        x = self.conv1(z)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            blocks = self.block_res_blocks[level]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x)
            if level > 0 and self.double_before[level - 1]:
                x = interleave_frames(self.conv_blocks[level - 1](x))
        out: Tensor = self.conv_out(self.norm1(x))
        return out


def interleave_frames(x: Tensor) -> Tensor:
    """Move channel 2c + s of frame t to channel c of frame 2t + s.

    Args:
        x: [B, 2C, T, H, W].

    Returns:
        [B, C, 2T, H, W], channels last.
    """
    batch, channels, *size = x.shape
    halves = x.view(batch, channels // 2, 2, *size)
    return halves.permute(0, 3, 2, 4, 5, 1).flatten(1, 2).movedim(-1, 1)


class VAETemporal(PretrainedMixin, nn.Module):
    """Encode frames to a Gaussian over fewer latent frames, and decode them back.

    Time is padded with zeros at the front to a multiple of the temporal factor; decoding drops
    the same frames again, so it needs to know how many were asked for.
    """

    family = "VAE_Temporal"
    config_class = VAETemporalConfig

    def __init__(self, config: VAETemporalConfig) -> None:
        super().__init__()
        self.config = config
        latent, embed = config.latent_embed_dim, config.embed_dim
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * latent, 2 * embed, 1)
        self.post_quant_conv = CausalConv3d(embed, latent, 1)
        self.decoder = Decoder(config)

    def latent_frames(self, num_frames: int) -> int:
        """Return ceil(num_frames / temporal factor)."""
        return -(-num_frames // self.config.temporal_factor)

    def encode(self, x: Tensor) -> Posterior:
        """Return the posterior [B, embed, ceil(T / f), H, W] of x [B, in_out, T, H, W].

        Raises:
            UsageError: x has another number of axes or channels, or no frames.
        """
        channels = self.config.in_out_channels
        if x.ndim != 5 or x.shape[1] != channels or x.shape[2] == 0:
            raise UsageError(
                f"VAETemporal.encode: expected [B, {channels}, T >= 1, H, W], got {tuple(x.shape)}"
            )
        pad = -x.shape[2] % self.config.temporal_factor
        if pad:
            x = F.pad(x, (0, 0, 0, 0, pad, 0))
        return Posterior.from_moments(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Return num_frames frames [B, in_out, num_frames, H, W] of z [B, embed, T', H, W].

        Raises:
            UsageError: z has another number of axes or channels, or T' does not belong to
                num_frames.
        """
        channels = self.config.embed_dim
        if z.ndim != 5 or z.shape[1] != channels:
            raise UsageError(
                f"VAETemporal.decode: expected [B, {channels}, T, H, W], got {tuple(z.shape)}"
            )
        if num_frames < 1 or z.shape[2] != self.latent_frames(num_frames):
            raise UsageError(
                f"VAETemporal.decode: {num_frames} frames need {self.latent_frames(num_frames)} "
                f"latent frames, got {z.shape[2]}"
            )
        x: Tensor = self.decoder(self.post_quant_conv(z))
        return x[:, :, -num_frames % self.config.temporal_factor :]

    def forward(self, x: Tensor) -> tuple[Tensor, Posterior, Tensor]:
        """Return (reconstruction, posterior, sampled latent) of x."""
        posterior = self.encode(x)
        z = posterior.sample()
        return self.decode(z, x.shape[2]), posterior, z
