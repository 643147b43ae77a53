"""Add the gradients of one batch of clips to a video VAE and its discriminator.

The decoder and the discriminator are judged on one and the same reconstruction: the discriminator's
gradients do not depend on the step that the VAE takes, so both take theirs at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.errors import UsageError
from opensora.models.vae import SPATIAL_SCALE, VideoAutoencoder
from opensora.models.vae.blocks_2d import AttentionBlock2D, ResnetBlock2D
from opensora.models.vae.discriminator import NLayerDiscriminator
from opensora.models.vae.losses import (
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    kl_loss,
    reconstruction_loss,
)
from opensora.models.vae.lpips import LPIPS
from opensora.models.vae.temporal import ResBlock
from opensora.train_vae_config import TrainVAEConfig

#: What a batch may report, in the order of log lines.
REPORTED = (
    "loss", "nll", "kl", "z_nll", "identity", "adversarial", "adaptive", "disc", "lecam",
    "logit_real", "logit_fake", "psnr", "frames",
)  # fmt: skip


def shorten(video: Tensor, config: TrainVAEConfig, number: int) -> Tensor:
    """Keep the first frames of a batch as the mixed strategy says.

    Args:
        video: [B, 3, T, H, W].
        config: mixed_strategy, mixed_image_ratio and seed.
        number: of the batch; the choice is made from it and the seed alone.
    """
    rng = random.Random(f"{config.seed}/mixed/{number}")
    if config.mixed_strategy == "mixed_video_random":
        return video[:, :, : rng.randint(1, video.shape[2])]
    if config.mixed_strategy and rng.random() < config.mixed_image_ratio:
        return video[:, :, :1]
    return video


def prepare(vae: VideoAutoencoder, config: TrainVAEConfig) -> None:
    """Let exactly the parameters learn that a loss reaches, and recompute blocks if asked to.

    Without a loss on pixels the 2D decoder does not run; what would never get a gradient must not
    be decayed either.

    Raises:
        UsageError: nothing is left to learn, or the identity loss has nothing to compare.
    """
    vae.requires_grad_(True)
    spatial = vae.spatial_vae.module
    if config.model.get("freeze_vae_2d"):
        spatial.requires_grad_(False)
    if not config.needs_pixels:
        spatial.decoder.requires_grad_(False)
        if spatial.post_quant_conv is not None:
            spatial.post_quant_conv.requires_grad_(False)
    channels, latent = vae.config.temporal.in_out_channels, vae.latent_channels
    if config.use_image_identity_loss and channels != latent:
        raise UsageError(
            f"use_image_identity_loss compares latents of {latent} channels with 2D latents of "
            f"{channels}; set it to False for this VAE"
        )
    if config.grad_checkpoint:
        for block in vae.modules():
            if isinstance(block, ResBlock | ResnetBlock2D | AttentionBlock2D):
                # Replaced on the instance: a wrapper module would change the parameters' names.
                again = partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
                block.forward = again  # type: ignore[method-assign]


class VAEObjective:
    """Compute the losses that a configuration asks for and their gradients.

    Args:
        config: weights of the losses.
        vae: see `prepare`.
        discriminator: None trains without.
        perceptual: LPIPS; None leaves it out.

    Attributes:
        lecam: averages of the discriminator's logits; a module, for its state dict.
    """

    def __init__(
        self,
        config: TrainVAEConfig,
        vae: VideoAutoencoder,
        discriminator: NLayerDiscriminator | None = None,
        perceptual: LPIPS | None = None,
    ) -> None:
        self.config, self.vae, self.discriminator = config, vae, discriminator
        self.perceptual, self.lecam = perceptual, LeCam().to(vae.scale.device)

    def backward(self, video: Tensor, step: int) -> dict[str, float]:
        """Add the gradients of a batch to `.grad`.

        Args:
            video: float32 [B, 3, T, H, W] in [-1, 1].
            step: optimizer steps taken so far, for discriminator_start.

        Returns:
            The values of `REPORTED` that this batch has. "disc" is among them exactly if the
            discriminator got gradients.
        """
        config = self.config
        enabled = config.dtype == "bf16"
        with torch.autocast(video.device.type, torch.bfloat16, enabled=enabled):
            told, made = self._generator(video, step)
            if made is not None and self.discriminator is not None:
                told |= self._discriminator(video, made)
        return {**told, "frames": float(video.shape[2])}

    def _generator(self, video: Tensor, step: int) -> tuple[dict[str, float], Tensor | None]:
        """Return what to report, and the reconstruction if the discriminator shall judge it."""
        config, told = self.config, {}
        latents = self.vae.reconstruct_latents(video)
        z_nll = reconstruction_loss(latents.x_z, latents.x_z_rec, logvar=config.logvar_init)
        told["z_nll"] = z_nll
        loss = z_nll if config.use_z_rec_loss else torch.zeros_like(z_nll)
        if config.use_image_identity_loss and video.shape[2] == 1:
            told["identity"] = reconstruction_loss(
                latents.x_z, latents.z, logvar=config.logvar_init
            )
            loss = loss + told["identity"]
        judged = None
        if config.needs_pixels:
            made = self.vae.spatial_decode(latents.x_z_rec / SPATIAL_SCALE)
            told["nll"] = reconstruction_loss(
                video,
                made,
                perceptual=self.perceptual,
                perceptual_weight=config.perceptual_loss_weight,
                logvar=config.logvar_init,
            )
            told["psnr"] = psnr(video, made)
            if config.use_real_rec_loss:
                told["kl"] = config.kl_loss_weight * kl_loss(latents.posterior)
                loss = loss + told["nll"] + told["kl"]
            judge = self.discriminator
            if judge is not None and step >= config.discriminator_start and judge.accepts(video):
                loss = loss + self._adversarial(made, told)
                judged = made.detach()
        told["loss"] = loss
        loss.backward()
        return {name: float(value.detach()) for name, value in told.items()}, judged

    def _adversarial(self, made: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Return the weighted loss of the decoder against the discriminator."""
        config = self.config
        assert self.discriminator is not None
        with frozen(self.discriminator):
            fake = self.discriminator.judge(made)
            adversarial = generator_loss(fake, config.generator_loss_type)  # type: ignore[arg-type]
            last = self.vae.temporal_vae.decoder.conv_out.conv.weight
            weight = config.generator_factor * adaptive_weight(told["nll"], adversarial, last)
        told["adaptive"] = weight
        told["adversarial"] = weight * config.discriminator_factor * adversarial
        return told["adversarial"]

    def _discriminator(self, video: Tensor, made: Tensor) -> dict[str, float]:
        """Add the discriminator's gradients; returns what to report."""
        config = self.config
        assert self.discriminator is not None
        real, fake = self.discriminator.judge(video), self.discriminator.judge(made)
        loss = config.discriminator_factor * discriminator_loss(
            real,
            fake,
            config.discriminator_loss_type,  # type: ignore[arg-type]
        )
        told = {"disc": float(loss.detach())}
        if config.lecam_loss_weight:
            held = config.lecam_loss_weight * self.lecam(real, fake)
            told["lecam"] = float(held.detach())
            loss = loss + held
        loss.backward()
        return told | {
            "logit_real": float(real.detach().mean()),
            "logit_fake": float(fake.detach().mean()),
        }


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients pass through a module without leaving any in it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


@torch.no_grad()
def psnr(video: Tensor, made: Tensor) -> Tensor:
    """Compute 10 log10(4 / mean squared error) in dB, of values in [-1, 1], over the whole batch.

    A reconstruction that is exact has 100 dB.
    """
    error = (video.float() - made.float().clamp(-1, 1)).square().mean()
    return 10 * torch.log10(4 / error.clamp(min=4e-10))
