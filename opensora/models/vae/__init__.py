"""The VAEs: per frame (AutoencoderKL), over time (VAETemporal), and both (VideoAutoencoder)."""

from opensora.models.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from opensora.models.vae.conv import CausalConv3d
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.reconstruction import LatentReconstruction, Reconstruction
from opensora.models.vae.temporal import VAETemporal, VAETemporalConfig
from opensora.models.vae.video import SPATIAL_SCALE, VideoAutoencoder
from opensora.models.vae.video_config import OPENSORA_VAE_V1_2, PRESETS, VideoAutoencoderConfig

__all__ = [
    "OPENSORA_VAE_V1_2",
    "PRESETS",
    "SPATIAL_SCALE",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "CausalConv3d",
    "LatentReconstruction",
    "Posterior",
    "Reconstruction",
    "VAETemporal",
    "VAETemporalConfig",
    "VideoAutoencoder",
    "VideoAutoencoderConfig",
]
