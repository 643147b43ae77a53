"""Describe the video VAE in the published config.json's names, and the releases' presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from opensora.errors import UsageError, WeightsError
from opensora.models.config_fields import read_fields
from opensora.models.vae.autoencoder_kl import DOWN_BLOCK, UP_BLOCK, AutoencoderKLConfig
from opensora.models.vae.temporal import VAETemporalConfig

# The architecture that Stable Diffusion's and SDXL's 2D VAEs share.
SPATIAL_SDXL = AutoencoderKLConfig(
    down_block_types=(DOWN_BLOCK,) * 4,
    up_block_types=(UP_BLOCK,) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=512,
    scaling_factor=0.13025,
)
SPATIAL_SOURCES = {
    "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers": SPATIAL_SDXL,
    "stabilityai/sdxl-vae": SPATIAL_SDXL,
    "stabilityai/sd-vae-ft-ema": dataclasses.replace(
        SPATIAL_SDXL, sample_size=256, scaling_factor=0.18215
    ),
}
_TEMPORAL_PRESETS = {"VAE_Temporal_SD": VAETemporalConfig()}
_LOADING = ("from_pretrained", "subfolder", "cache_dir", "local_files_only", "force_huggingface")


@dataclasses.dataclass(frozen=True)
class VideoAutoencoderConfig:
    """Describe a video VAE.

    Attributes:
        spatial: the 2D VAE; its latent_channels are the temporal VAE's in_out_channels.
        temporal: the temporal VAE.
        shift: one number per latent channel, or one for all: z = (raw - shift) / scale.
        scale: likewise.
        micro_frame_size: frames per chunk of the temporal VAE; None: the whole video at once.
        micro_batch_size: frames per call of the 2D VAE; None: all frames at once.
        cal_loss: encode and decode work on raw latents, without shift and scale (VAE training).
    """

    spatial: AutoencoderKLConfig = SPATIAL_SDXL
    temporal: VAETemporalConfig = VAETemporalConfig()  # noqa: RUF009  frozen, shared safely
    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0
    micro_frame_size: int | None = 17
    micro_batch_size: int | None = 4
    cal_loss: bool = False

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        if self.spatial.latent_channels != self.temporal.in_out_channels:
            raise UsageError(
                f"VideoAutoencoderConfig: temporal in_out_channels "
                f"{self.temporal.in_out_channels} must equal spatial latent_channels "
                f"{self.spatial.latent_channels}"
            )
        for name in ("shift", "scale"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.temporal.embed_dim:
                raise UsageError(
                    f"VideoAutoencoderConfig: {name} has {len(value)} values, expected one number "
                    f"or {self.temporal.embed_dim}, one per latent channel"
                )
        for name in ("micro_frame_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    f"VideoAutoencoderConfig: {name} must be at least 1 or None, got {value}"
                )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VideoAutoencoderConfig:
        """Read a published config.json, the `vae` entry of a configuration, or `to_dict`.

        A `type` that names a release (OpenSoraVAE_V1_2) starts from its preset. The 2D VAE
        (`vae_2d`) is one of the known `from_pretrained` names or described by its own fields;
        the temporal one (`vae_temporal`) is `VAE_Temporal_SD` or described by its own fields.

        Raises:
            UsageError: an unknown key, type or 2D VAE.
        """
        data = dict(data)
        spatial, temporal = data.pop("vae_2d", None), data.pop("vae_temporal", None)
        fields = read_fields(cls, data, ignored=(*_LOADING, "freeze_vae_2d"))
        # "type" in a configuration of this project's form, "model_type" in a published config.json
        kind = data.get("type") or data.get("model_type") or "VideoAutoencoderPipeline"
        preset = PRESETS.get(kind)
        if preset is None and kind != "VideoAutoencoderPipeline":
            raise UsageError(
                f"VideoAutoencoderConfig: type {kind!r} is not a video VAE of this project; "
                f"expected 'VideoAutoencoderPipeline' or one of {sorted(PRESETS)}"
            )
        if preset is None and (spatial is None or temporal is None):
            missing = "vae_2d" if spatial is None else "vae_temporal"
            raise UsageError(f"VideoAutoencoderConfig: the key {missing!r} is missing")
        if spatial is not None:
            fields["spatial"] = _spatial(spatial)
            if "micro_batch_size" in spatial:
                fields["micro_batch_size"] = spatial["micro_batch_size"]
            elif preset is None:
                fields.setdefault("micro_batch_size", None)
        if temporal is not None:
            fields["temporal"] = _temporal(temporal)
        return cls(**fields) if preset is None else dataclasses.replace(preset, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the published config.json's form with the architecture spelled out."""
        return {
            "model_type": "VideoAutoencoderPipeline",
            "vae_2d": {
                "type": "VideoAutoencoderKL",
                "micro_batch_size": self.micro_batch_size,
                **self.spatial.to_dict(),
            },
            "vae_temporal": {"type": "VAE_Temporal", **self.temporal.to_dict()},
            "shift": list(self.shift) if isinstance(self.shift, tuple) else self.shift,
            "scale": list(self.scale) if isinstance(self.scale, tuple) else self.scale,
            "micro_frame_size": self.micro_frame_size,
            "cal_loss": self.cal_loss,
        }


def _spatial(data: Mapping[str, Any]) -> AutoencoderKLConfig:
    kind = data.get("type", "VideoAutoencoderKL")
    if kind != "VideoAutoencoderKL":
        raise UsageError(
            f"VideoAutoencoderConfig: vae_2d type {kind!r} is not supported; "
            "only 'VideoAutoencoderKL' is"
        )
    rest = {k: v for k, v in data.items() if k not in (*_LOADING, "micro_batch_size")}
    if "block_out_channels" in rest:
        return AutoencoderKLConfig.from_dict(rest)
    source = data.get("from_pretrained")
    if source not in SPATIAL_SOURCES:
        raise UsageError(
            f"VideoAutoencoderConfig: the architecture of the 2D VAE {source!r} is unknown; "
            f"write its block_out_channels and other fields into vae_2d, or use one of "
            f"{sorted(SPATIAL_SOURCES)}"
        )
    return SPATIAL_SOURCES[source]


def _temporal(data: Mapping[str, Any]) -> VAETemporalConfig:
    kind = data.get("type", "VAE_Temporal")
    if kind in _TEMPORAL_PRESETS:
        return _TEMPORAL_PRESETS[kind]
    if kind != "VAE_Temporal":
        raise UsageError(
            f"VideoAutoencoderConfig: vae_temporal type {kind!r} is not supported; "
            f"only 'VAE_Temporal' and {sorted(_TEMPORAL_PRESETS)} are"
        )
    return VAETemporalConfig.from_dict(data)


OPENSORA_VAE_V1_2 = VideoAutoencoderConfig(
    shift=(-0.10, 0.34, 0.27, 0.98), scale=(3.85, 2.32, 2.33, 3.06)
)
PRESETS = {"OpenSoraVAE_V1_2": OPENSORA_VAE_V1_2}


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> VideoAutoencoderConfig:
    """Return the config of weights that come without a config.json: the published ones only.

    Raises:
        WeightsError: other shapes; the number of norm groups cannot be read from them.
    """
    spatial = shapes.get("spatial_vae.module.encoder.conv_in.weight")
    temporal = shapes.get("temporal_vae.encoder.conv_in.conv.weight")
    if (spatial, temporal) != ((128, 3, 3, 3), (128, 4, 3, 3, 3)):
        raise WeightsError(
            "these VideoAutoencoder weights are not the published OpenSoraVAE_V1_2 and have no "
            "config.json; put it beside them"
        )
    return OPENSORA_VAE_V1_2
