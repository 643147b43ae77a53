"""Encode and decode single images: the 2D VAE of Stable Diffusion and SDXL.

Parameter names are those of diffusers' AutoencoderKL, so its checkpoints load as they are; the
attention names of older diffusers are renamed on loading (blocks_2d.py).
Source: Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoint import PretrainedMixin
from opensora.errors import UsageError
from opensora.models.config_fields import read_fields
from opensora.models.vae.blocks_2d import EPS, DownBlock2D, MidBlock2D, UpBlock2D
from opensora.models.vae.conv import Conv2d
from opensora.models.vae.norm import GroupNorm
from opensora.models.vae.posterior import Posterior

DOWN_BLOCK = "DownEncoderBlock2D"
UP_BLOCK = "UpDecoderBlock2D"
# What diffusers writes although it changes no module and no number computed here.
_IGNORED = ("force_upcast", "latents_mean", "latents_std", "shift_factor")


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Describe a 2D VAE in the field names of diffusers' config.json.

    One level per entry of `block_out_channels`; every level but the last halves height and width.
    The block types may be left out: there is one of each kind. `sample_size` and `scaling_factor`
    are kept for the file's sake and change nothing here.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        """Check that this library can build the described model."""
        levels = len(self.block_out_channels)
        for name, kind in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
            types = getattr(self, name) or (kind,) * levels
            object.__setattr__(self, name, types)
            if any(entry != kind for entry in types):
                raise UsageError(
                    f"AutoencoderKLConfig: {name} {types} is not supported; only {kind!r} is"
                )
            if len(types) != levels:
                raise UsageError(
                    f"AutoencoderKLConfig: {name} has {len(types)} entries, expected {levels}, "
                    f"one per entry of block_out_channels {self.block_out_channels}"
                )
        if self.act_fn != "silu":
            raise UsageError(
                f"AutoencoderKLConfig: act_fn {self.act_fn!r} is not supported; only 'silu' is"
            )
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise UsageError(
                f"AutoencoderKLConfig: norm_num_groups {self.norm_num_groups} does not divide "
                f"every width of block_out_channels {self.block_out_channels}"
            )

    @property
    def spatial_factor(self) -> int:
        """Return how many pixels of height or width one latent value covers."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AutoencoderKLConfig:
        """Read the content of a config.json of diffusers or of `to_dict`."""
        return cls(**read_fields(cls, data, ignored=_IGNORED))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        data = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


class Encoder2D(nn.Module):
    """Map images [B, in, H, W] to moments [B, 2 * latent, H / f, W / f]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3)
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.down_blocks = nn.ModuleList(
            DownBlock2D(pair, config.layers_per_block, groups, i < len(pairs) - 1)
            for i, pair in enumerate(pairs)
        )
        self.mid_block = MidBlock2D(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the moments before the quantising convolution."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out


class Decoder2D(nn.Module):
    """Map latents [B, latent, h, w] to images [B, out, h * f, w * f]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3)
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.up_blocks = nn.ModuleList(
            UpBlock2D(pair, config.layers_per_block + 1, groups, i < len(pairs) - 1)
            for i, pair in enumerate(pairs)
        )
        self.mid_block = MidBlock2D(widths[0], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """Return the images."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out


class AutoencoderKL(PretrainedMixin, nn.Module):
    """Encode images to a Gaussian over latents, and decode latents to images.

    Latents are the network's own: no scaling factor is applied here.
    """

    family = "AutoencoderKL"
    config_class = AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder2D(config)
        self.decoder = Decoder2D(config)
        self.quant_conv: Conv2d | None = None
        self.post_quant_conv: Conv2d | None = None
        if config.use_quant_conv:
            self.quant_conv = Conv2d(2 * latent, 2 * latent, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv2d(latent, latent, 1)

    def encode(self, x: Tensor) -> Posterior:
        """Return the posterior [B, latent, H // f, W // f] of images x [B, in, H, W] in [-1, 1].

        Raises:
            UsageError: x has another number of axes or channels, or is smaller than one latent.
        """
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise UsageError(
                f"AutoencoderKL.encode: expected images [B, {config.in_channels}, H, W], "
                f"got {tuple(x.shape)}"
            )
        if min(x.shape[2:]) < config.spatial_factor:
            raise UsageError(
                f"AutoencoderKL.encode: expected height and width of at least "
                f"{config.spatial_factor} pixels, got {tuple(x.shape[2:])}"
            )
        moments = self.encoder(x)
        return Posterior.from_moments(
            moments if self.quant_conv is None else self.quant_conv(moments)
        )

    def decode(self, z: Tensor) -> Tensor:
        """Return images [B, out, h * f, w * f] of latents z [B, latent, h, w].

        Raises:
            UsageError: z has another number of axes or channels.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise UsageError(
                f"AutoencoderKL.decode: expected latents [B, {self.config.latent_channels}, h, w], "
                f"got {tuple(z.shape)}"
            )
        out: Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return out

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the reconstruction of x through one sample of its posterior."""
        return self.decode(self.encode(x).sample(generator))
