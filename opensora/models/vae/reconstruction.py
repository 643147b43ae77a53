"""Hold what a video VAE returns for training and measuring."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from opensora.models.vae.posterior import Posterior


class Reconstruction(NamedTuple):
    """Hold everything that a training loss needs; see `VideoAutoencoder.forward`."""

    x_rec: Tensor
    x_z_rec: Tensor
    z: Tensor
    posterior: Posterior
    x_z: Tensor


class LatentReconstruction(NamedTuple):
    """Hold what the losses on 2D latents need; see `VideoAutoencoder.reconstruct_latents`."""

    x_z_rec: Tensor
    z: Tensor
    posterior: Posterior
    x_z: Tensor
