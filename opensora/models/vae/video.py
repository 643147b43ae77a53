"""Encode and decode videos: the VAE of Open-Sora 1.2, a 2D VAE per frame, then a temporal VAE.

Frames pass the 2D VAE in micro batches and the temporal VAE in chunks of `micro_frame_size`
frames, so memory does not grow with the length of a video. Chunks share nothing.
Source: the published checkpoint hpcai-tech/OpenSora-VAE-v1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from opensora.checkpoint import PretrainedMixin
from opensora.errors import UsageError
from opensora.models.vae.autoencoder_kl import AutoencoderKL
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.reconstruction import LatentReconstruction, Reconstruction
from opensora.models.vae.temporal import VAETemporal
from opensora.models.vae.video_config import VideoAutoencoderConfig, infer_config

# Published with the first release and kept since, also for the SDXL-type 2D VAE of 1.2, whose own
# factor is another one: the temporal VAE was trained on latents of this scale.
SPATIAL_SCALE = 0.18215


class _Spatial(nn.Module):
    """Hold the 2D VAE under the published name `spatial_vae.module`."""

    def __init__(self, module: AutoencoderKL) -> None:
        super().__init__()
        self.module = module


class VideoAutoencoder(PretrainedMixin, nn.Module):
    """Map videos to normalised latents and back.

    encode: z = (temporal(0.18215 * spatial(x)) - shift) / scale, both posteriors sampled.
    decode: the inverse maps in the inverse order.
    """

    family = "VideoAutoencoderPipeline"
    config_class = VideoAutoencoderConfig
    infer_config = staticmethod(infer_config)
    scale: Tensor
    shift: Tensor

    def __init__(self, config: VideoAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.micro_frame_size = config.micro_frame_size
        self.micro_batch_size = config.micro_batch_size
        self.spatial_vae = _Spatial(AutoencoderKL(config.spatial))
        self.temporal_vae = VAETemporal(config.temporal)
        for name in ("scale", "shift"):
            value = torch.tensor(getattr(config, name), dtype=torch.float32)
            self.register_buffer(name, value.view(1, -1, 1, 1, 1) if value.ndim else value)

    @property
    def latent_channels(self) -> int:
        """Return the channels of z."""
        return self.config.temporal.embed_dim

    def get_latent_size(self, size: tuple[int | None, int, int]) -> tuple[int | None, int, int]:
        """Return (T', H', W') of the latent of a video of size (T, H, W); T None stays None."""
        frames, height, width = size
        factor = self.config.spatial.spatial_factor
        latent_frames = None
        if frames is not None:
            latent_frames = sum(self.temporal_vae.latent_frames(n) for n in self._chunks(frames))
        return latent_frames, height // factor, width // factor

    def spatial_encode(self, x: Tensor) -> Posterior:
        """Return the 2D VAE's posterior of every frame.

        Args:
            x: [B, in, T, H, W], values in [-1, 1].

        Returns:
            Posterior [B, C, T, H // f, W // f] of unscaled latents: the temporal VAE takes
            SPATIAL_SCALE times a sample.

        Raises:
            UsageError: x has another number of axes or channels, no frames, or too small frames.
        """
        channels = self.config.spatial.in_channels
        if x.ndim != 5 or x.shape[1] != channels or x.shape[2] == 0:
            raise UsageError(
                f"VideoAutoencoder.encode: expected a video [B, {channels}, T >= 1, H, W], "
                f"got {tuple(x.shape)}"
            )
        moments = self._map_frames(self._frame_moments, x, None)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar)

    def spatial_decode(
        self, latents: Tensor, *, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Return the frames [B, out, T, h * f, w * f] of 2D latents.

        Args:
            latents: [B, C, T, h, w], unscaled: the temporal VAE's output over SPATIAL_SCALE.
            progress: called with (frames done, frames in all) after every micro batch.
        """
        return self._map_frames(self.spatial_vae.module.decode, latents, progress)

    def encode(
        self,
        x: Tensor,
        *,
        sample: bool = True,
        generator: torch.Generator | None = None,
        noise: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Return the normalised latent of a video.

        Args:
            x: [B, 3, T, H, W], values in [-1, 1], any floating dtype and device.
            sample: draw from both posteriors, as published; False takes their means.
            generator: source of the noise.
            noise: standard normal tensors used instead of draws, in this order: one of
                [frames, C, h, w] for every micro batch of frames (frames of all samples in one
                row, time fastest), then one of [B, C, T', h, w] for every chunk.

        Returns:
            z [B, latent_channels, T', H // 8, W // 8] in the weights' dtype, T' as in
            `get_latent_size`.

        Raises:
            UsageError: a shape that does not fit, named with the expected one.
        """
        z = self._encode(x.to(self.scale), sample, generator, noise)[0]
        return z if self.config.cal_loss else (z - self.shift) / self.scale

    def encode_distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of a video's normalised latent, like `encode`'s z.

        The mean is `encode(x, sample=False)`. The deviation is the temporal posterior's; that of
        the 2D one, which `encode` draws from too, is far below it and left out.
        """
        z, posterior, _ = self._encode(x.to(self.scale), False, None, None)
        std = torch.exp(0.5 * posterior.logvar)
        if self.config.cal_loss:
            return z, std
        return (z - self.shift) / self.scale, std / self.scale

    def decode(
        self,
        z: Tensor,
        num_frames: int,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Return the video of a normalised latent.

        At most one micro batch of frames is inside the 2D decoder, and one chunk inside the
        temporal decoder, at any time.

        Args:
            z: [B, latent_channels, T', h, w], any floating dtype.
            num_frames: frames T of the video; T' must be that of `get_latent_size`.
            progress: called with (frames done, frames in all) after every micro batch.

        Returns:
            [B, 3, num_frames, h * 8, w * 8] in the weights' dtype, not clamped.

        Raises:
            UsageError: a shape that does not fit, named with the expected one.
        """
        z = z.to(self.scale)
        if not self.config.cal_loss:
            z = z * self.scale + self.shift
        latents = self._temporal_decode(z, num_frames) / SPATIAL_SCALE
        return self.spatial_decode(latents, progress=progress)

    def forward(
        self,
        x: Tensor,
        *,
        sample: bool = True,
        generator: torch.Generator | None = None,
        noise: Iterable[Tensor] | None = None,
    ) -> Reconstruction:
        """Return a video's reconstruction and what the training losses compare.

        Latents are raw: neither shift nor scale is applied. Arguments are those of `encode`.

        Returns:
            x_rec: like x; the rest as in `reconstruct_latents`.
        """
        latents = self.reconstruct_latents(x, sample=sample, generator=generator, noise=noise)
        return Reconstruction(self.spatial_decode(latents.x_z_rec / SPATIAL_SCALE), *latents)

    def reconstruct_latents(
        self,
        x: Tensor,
        *,
        sample: bool = True,
        generator: torch.Generator | None = None,
        noise: Iterable[Tensor] | None = None,
    ) -> LatentReconstruction:
        """Return what `forward` does but for the pixels: the 2D decoder does not run.

        Returns:
            x_z_rec: the 2D latents that the temporal VAE reconstructs; z: the raw latent;
            posterior: the temporal one, of all chunks; x_z: the 2D latents that were encoded,
            times SPATIAL_SCALE.
        """
        z, posterior, x_z = self._encode(x, sample, generator, noise)
        return LatentReconstruction(self._temporal_decode(z, x.shape[2]), z, posterior, x_z)

    def _chunks(self, num_frames: int) -> list[int]:
        """Return the lengths of the chunks that the temporal VAE works on."""
        size = self.micro_frame_size or max(num_frames, 1)
        return [min(size, num_frames - start) for start in range(0, num_frames, size)]

    def _frame_moments(self, frames: Tensor) -> Tensor:
        posterior = self.spatial_vae.module.encode(frames)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def _encode(
        self,
        x: Tensor,
        sample: bool,
        generator: torch.Generator | None,
        noise: Iterable[Tensor] | None,
    ) -> tuple[Tensor, Posterior, Tensor]:
        recorded = None if noise is None else iter(noise)
        spatial = self.spatial_encode(x)
        batch, _, length = spatial.mean.shape[:3]
        x_z = spatial.mode()
        if sample:
            drawn = None
            if recorded is not None:
                size = self.micro_batch_size or batch * length
                pieces = [_take(recorded) for _ in range(0, batch * length, size)]
                drawn = torch.cat(pieces).unflatten(0, (batch, length)).transpose(1, 2)
            x_z = spatial.sample(generator, noise=drawn)
        x_z = SPATIAL_SCALE * x_z
        posteriors = [self.temporal_vae.encode(c) for c in x_z.split(self._chunks(length), dim=2)]
        zs = [
            p.sample(generator, noise=None if recorded is None else _take(recorded))
            if sample
            else p.mode()
            for p in posteriors
        ]
        posterior = Posterior(
            torch.cat([p.mean for p in posteriors], dim=2),
            torch.cat([p.logvar for p in posteriors], dim=2),
        )
        return torch.cat(zs, dim=2), posterior, x_z

    def _temporal_decode(self, z: Tensor, num_frames: int) -> Tensor:
        if num_frames < 1:
            raise UsageError(f"VideoAutoencoder.decode: expected num_frames >= 1, got {num_frames}")
        chunks = self._chunks(num_frames)
        latent_chunks = [self.temporal_vae.latent_frames(n) for n in chunks]
        expected = f"[B, {self.latent_channels}, {sum(latent_chunks)}, h, w]"
        if z.ndim != 5 or z.shape[1] != self.latent_channels or z.shape[2] != sum(latent_chunks):
            raise UsageError(
                f"VideoAutoencoder.decode: {num_frames} frames need a latent {expected}, "
                f"got {tuple(z.shape)}"
            )
        parts = [
            self.temporal_vae.decode(part, n)
            for part, n in zip(z.split(latent_chunks, dim=2), chunks, strict=True)
        ]
        return torch.cat(parts, dim=2)

    def _map_frames(
        self,
        fn: Callable[[Tensor], Tensor],
        x: Tensor,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        """Apply fn to the frames of x [B, C, T, H, W], a micro batch at a time."""
        batch, _, length = x.shape[:3]
        total = batch * length
        size = self.micro_batch_size or total
        if size >= total or (torch.is_grad_enabled() and self._needs_grad(x)):
            # With gradients every activation is kept anyway, and a copy into a slice of one
            # output would add a node per micro batch to the graph.
            frames = x.transpose(1, 2).flatten(0, 1)
            parts = []
            for piece in frames.split(size):
                parts.append(fn(piece))
                if progress is not None:
                    progress(sum(len(part) for part in parts), total)
            y = torch.cat(parts) if len(parts) > 1 else parts[0]
            return y.view(batch, length, *y.shape[1:]).transpose(1, 2)
        out: Tensor | None = None
        for start in range(0, total, size):
            where = [divmod(i, length) for i in range(start, min(start + size, total))]
            y = fn(torch.stack([x[b, :, t] for b, t in where]))
            if out is None:
                out = y.new_empty((batch, y.shape[1], length, *y.shape[2:]))
            for frame, (b, t) in zip(y, where, strict=True):
                out[b, :, t] = frame
            if progress is not None:
                progress(start + len(where), total)
        assert out is not None
        return out

    def _needs_grad(self, x: Tensor) -> bool:
        parameters = self.spatial_vae.parameters()
        return bool(x.requires_grad) or any(p.requires_grad for p in parameters)


def _take(noise: Iterator[Tensor]) -> Tensor:
    """Return the next recorded tensor."""
    try:
        return next(noise)
    except StopIteration:
        raise UsageError(
            "VideoAutoencoder.encode: noise ran out; expected one tensor per micro batch of "
            "frames and one per chunk"
        ) from None
