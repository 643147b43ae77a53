"""Shift the timesteps of a rectified flow with the size and length of the clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opensora.errors import UsageError


def timestep_transform(
    t: Tensor,
    height: Tensor,
    width: Tensor,
    num_frames: Tensor,
    *,
    scale: float = 1.0,
    num_timesteps: int = 1000,
    short_clips: bool = True,
) -> Tensor:
    """Shift timesteps toward noise for larger and longer clips.

        r = sqrt(height * width / 512^2) * sqrt(F) * scale,   t' = 1000 r u / (1 + (r - 1) u),
        u = t / 1000,   F = 1 if num_frames[0] == 1 else num_frames // 17 * 5

    F is the latent frame count of clips whose length is a multiple of 17. For 2 to 16 frames the
    original has F = 0, hence t' = 0 for every t < 1000 and NaN at 1000: nothing is denoised. With
    `short_clips` these lengths use F = ceil(num_frames / 4), their true latent frame count, which
    joins F = 1 at one frame and F = 5 at 17. Every other length keeps the published numbers.

    Args:
        t: float32 [B] (or any shape that broadcasts with [B]), in [0, num_timesteps].
        height: [B] pixels. The ratio is computed in this tensor's dtype, as in the original:
            bfloat16 sizes give a bfloat16 ratio.
        width: [B] pixels.
        num_frames: [B] video frames. Sample 0 decides whether the batch holds images.
        scale: factor on r.
        num_timesteps: value of t at pure noise.
        short_clips: False reproduces the original for 2 to 16 frames, NaN included.

    Returns:
        t' with the shape of t, in [0, num_timesteps].
    """
    if num_frames.flatten()[0] == 1:
        latent_frames = torch.ones_like(num_frames)
    else:
        latent_frames = torch.div(num_frames, 17, rounding_mode="floor") * 5
        if short_clips:
            short = torch.div(num_frames + 3, 4, rounding_mode="floor")
            latent_frames = torch.where(num_frames < 17, short, latent_frames)
    ratio = (height * width / 512**2).sqrt() * latent_frames.sqrt() * scale
    u = t / num_timesteps
    return ratio * u / (1 + (ratio - 1) * u) * num_timesteps


def clip_sizes(
    height: Tensor | float | None,
    width: Tensor | float | None,
    num_frames: Tensor | float | None,
    batch: int,
    device: torch.device,
) -> Sequence[Tensor]:
    """Return height, width and num_frames as [B] tensors; numbers become float32."""
    sizes = []
    for name, value in (("height", height), ("width", width), ("num_frames", num_frames)):
        if value is None:
            raise UsageError(
                f"the timestep transform needs {name}; pass it or set use_timestep_transform=False"
            )
        if not isinstance(value, Tensor):
            value = torch.tensor([value], dtype=torch.float32)
        sizes.append(value.to(device).flatten().expand(batch))
    return sizes
