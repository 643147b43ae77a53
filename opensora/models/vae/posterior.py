"""Hold the diagonal Gaussian that a VAE encoder predicts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Describe the Gaussian N(mean, exp(logvar)) of every latent value.

    Attributes:
        mean: [B, C, ...], the dtype of the encoder's output.
        logvar: [B, C, ...], natural logarithm of the variance, within [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Split moments [B, 2C, ...] into mean (first half) and clamped logvar (second half)."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    def mode(self) -> Tensor:
        """Return the most likely latent, the mean."""
        return self.mean

    def sample(
        self, generator: torch.Generator | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Return mean + exp(logvar / 2) * noise.

        Args:
            generator: source of the noise, of any device; the noise is drawn there in float32.
            noise: standard normal values of the mean's shape, used instead of a draw.

        Raises:
            ValueError: noise of another shape than the mean.
        """
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device)
        elif noise.shape != self.mean.shape:
            raise ValueError(
                f"posterior noise: expected {tuple(self.mean.shape)}, got {tuple(noise.shape)}"
            )
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Return KL(posterior || N(0, 1)) = 0.5 * sum(mean^2 + var - 1 - logvar), [B].

        Half-precision moments are summed in float32.
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
