"""Encode and decode single images: the 2D VAE of Stable Diffusion and SDXL.

Parameter names are those of diffusers' AutoencoderKL, so its checkpoints load as they are; the
attention names that diffusers used before (query, key, value, proj_attn) are renamed on loading.
Source: Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.errors import UsageError
from opensora.models.vae._fields import read_fields
from opensora.models.vae.posterior import Posterior

EPS = 1e-6
DOWN_BLOCK = "DownEncoderBlock2D"
UP_BLOCK = "UpDecoderBlock2D"
# What diffusers writes although it changes no module and no number computed here.
_IGNORED = ("force_upcast", "latents_mean", "latents_std", "shift_factor")


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Describe a 2D VAE in the field names of diffusers' config.json.

    One level per entry of `block_out_channels`; every level but the last halves height and width.
    `sample_size` and `scaling_factor` are kept for the file's sake and change nothing here.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (DOWN_BLOCK,)
    up_block_types: tuple[str, ...] = (UP_BLOCK,)
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
            types = getattr(self, name)
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


class ResnetBlock2D(nn.Module):
    """Apply x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B, out_channels, H, W] for x [B, in_channels, H, W]."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class AttentionBlock2D(nn.Module):
    """Let every pixel attend to all pixels of its image, one head of full width."""

    _RENAMED: ClassVar[dict[str, str]] = {
        "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"
    }  # fmt: skip

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.register_load_state_dict_pre_hook(self._rename_old_keys)

    @staticmethod
    def _rename_old_keys(
        module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
    ) -> None:
        for old, new in AttentionBlock2D._RENAMED.items():
            for leaf in ("weight", "bias"):
                if f"{prefix}{old}.{leaf}" in state_dict:
                    value = state_dict.pop(f"{prefix}{old}.{leaf}")
                    state_dict[f"{prefix}{new}.{leaf}"] = value

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention(norm(x)), [B, C, H, W]."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.to_out[0](y).transpose(1, 2).unflatten(2, x.shape[2:])


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
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H // 2, W // 2]."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample2D(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

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


class Encoder2D(nn.Module):
    """Map images [B, in, H, W] to moments [B, 2 * latent, H / f, W / f]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.down_blocks = nn.ModuleList(
            DownBlock2D(pair, config.layers_per_block, groups, i < len(pairs) - 1)
            for i, pair in enumerate(pairs)
        )
        self.mid_block = MidBlock2D(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the moments before the quantising convolution."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Decoder2D(nn.Module):
    """Map latents [B, latent, h, w] to images [B, out, h * f, w * f]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.up_blocks = nn.ModuleList(
            UpBlock2D(pair, config.layers_per_block + 1, groups, i < len(pairs) - 1)
            for i, pair in enumerate(pairs)
        )
        self.mid_block = MidBlock2D(widths[0], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Return the images."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class AutoencoderKL(nn.Module):
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
        self.quant_conv: nn.Conv2d | None = None
        self.post_quant_conv: nn.Conv2d | None = None
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(latent, latent, 1)

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
