"""Compute the losses of VAE training: reconstruction, KL, adversarial, and LeCam's regulariser.

Sums over all values are divided by the number of frames (reconstruction) or clips (KL), not by the
number of values: the published weights of the terms belong to sums.
Source: Esser et al. 2021, Taming Transformers; Tseng et al. 2021, Regularizing GANs under Limited
Data (LeCam).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models.vae.posterior import Posterior

GeneratorKind = Literal["hinge", "non-saturating"]
DiscriminatorKind = Literal["hinge", "vanilla", "non-saturating"]

# Keeps the adaptive weight finite where the adversarial gradient vanishes; and its upper end.
_ADAPTIVE_EPS, _ADAPTIVE_MAX = 1e-4, 1e4


def fold_frames(video: Tensor) -> Tensor:
    """Return the frames [B * T, C, H, W] of a video [B, C, T, H, W], time fastest."""
    return video.transpose(1, 2).flatten(0, 1)


def reconstruction_loss(
    target: Tensor,
    reconstruction: Tensor,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float = 0.1,
    logvar: float = 0.0,
) -> Tensor:
    """Compute sum((|x - r| + w * perceptual) / exp(logvar) + logvar) / frames.

    The perceptual distance of a frame is added to every value of the frame, as published: its
    effective weight is w times the number of values of a frame.

    Args:
        target: x [B, C, T, H, W], pixels in [-1, 1] or 2D latents.
        reconstruction: r, of the same shape.
        perceptual: maps two sets of frames [N, 3, H, W] to N distances; None leaves it out.
        perceptual_weight: w.
        logvar: logarithm of the assumed variance of a value.

    Returns:
        Scalar, float32 (float64 of float64 input).

    Raises:
        ValueError: the shapes differ.
    """
    if target.shape != reconstruction.shape or target.ndim != 5:
        raise ValueError(
            f"reconstruction_loss: expected two of [B, C, T, H, W], got {tuple(target.shape)} and "
            f"{tuple(reconstruction.shape)}"
        )
    dtype = torch.promote_types(target.dtype, torch.float32)
    x, r = fold_frames(target.to(dtype)), fold_frames(reconstruction.to(dtype))
    error = (x - r).abs()
    if perceptual is not None:
        error = error + perceptual_weight * perceptual(x, r).view(-1, 1, 1, 1)
    likelihood = error * torch.exp(torch.tensor(-logvar)) + logvar
    return likelihood.sum() / len(x)


def kl_loss(posterior: Posterior) -> Tensor:
    """Compute KL(posterior || N(0, 1)), summed over all values of a clip, mean over clips."""
    return posterior.kl().mean()


def generator_loss(fake: Tensor, kind: GeneratorKind) -> Tensor:
    """Compute what the decoder is told of the discriminator's logits of its reconstructions.

    Args:
        fake: logits of any shape.
        kind: "hinge" -mean(fake), or "non-saturating" mean(softplus(-fake)).
    """
    fake = fake.float()
    loss: Tensor = -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()
    return loss


def discriminator_loss(real: Tensor, fake: Tensor, kind: DiscriminatorKind) -> Tensor:
    """Compute the discriminator's loss of its logits of real and of reconstructed frames.

    hinge: (mean(relu(1 - real)) + mean(relu(1 + fake))) / 2. vanilla and non-saturating are one:
    (mean(softplus(-real)) + mean(softplus(fake))) / 2.
    """
    real, fake = real.float(), fake.float()
    loss: Tensor
    if kind == "hinge":
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return loss
    loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    return loss


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Compute |d reconstruction / d w| / (|d adversarial / d w| + 1e-4), clamped to [0, 1e4].

    It makes both losses pull equally at the decoder's last layer w.

    Args:
        reconstruction: scalar with a graph, which is kept.
        adversarial: likewise.
        last_layer: w, a weight that both depend on.

    Returns:
        Scalar without a graph.
    """
    (first,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (second,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = first.float().norm() / (second.float().norm() + _ADAPTIVE_EPS)
    weight: Tensor = ratio.clamp(0.0, _ADAPTIVE_MAX).detach()
    return weight


class LeCam(nn.Module):
    """Hold a discriminator's logits back from moving away from their past averages.

    The averages are buffers, so they are saved and resumed with a state dict.

    Args:
        decay: of the averages, which start at 0.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Compute relu(mean(real) - past fake)^2 + relu(past real - mean(fake))^2."""
        over = F.relu(real.float().mean() - self.fake)
        under = F.relu(self.real - fake.float().mean())
        return over.square() + under.square()

    @torch.no_grad()
    def update(self, real: float, fake: float) -> None:
        """Move the averages towards the mean logits of a step."""
        for average, value in ((self.real, real), (self.fake, fake)):
            average.mul_(self.decay).add_((1 - self.decay) * value)
