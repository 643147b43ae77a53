"""Fuse one step of the rectified-flow sampler: guidance, Euler step, frame mask, next batch.

    v = uncond + g * (cond - uncond),    y = z + v * dt where the mask is True, z elsewhere

Kernels: C++ on CPU (`csrc/cpu/cfg_rflow_step.cpp`), Triton on CUDA (`kernels/cfg_rflow_step.py`).
Used by `RFlow.sample`, once a step; inference only. Every product and sum is rounded on its own, in
the order of the formula, so the kernels return what eager PyTorch returns, bit for bit (a zero may
differ in sign).

Not included: noising frames that join at a step. It comes before the model call, most steps have
none, and in the previous step's launch it would show noised frames to that step's callback.
Axes: B batch, C latent channels, T latent frames, H x W latent pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora.ops import _library
from opensora.ops._library import Op, needs_grad

#: Of z, and of the velocities that its kernel reads.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float32,), "cuda": (torch.float32,)}
VELOCITIES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def reference(
    z: Tensor,
    velocity: Tensor,
    guidance: Tensor | float | None,
    dt: Tensor,
    mask: Tensor | None,
    copies: int,
) -> Tensor:
    """Compute the op in plain PyTorch, in z's dtype."""
    batch, channels = z.shape[:2]
    velocity = velocity[:, :channels].to(z.dtype)
    if guidance is not None:
        if isinstance(guidance, Tensor):
            guidance = guidance.to(z.dtype).view(-1, 1, 1, 1, 1)
        cond, uncond = velocity[:batch], velocity[batch:]
        velocity = uncond + guidance * (cond - uncond)
    y = z + velocity * dt.to(z.dtype).view(-1, 1, 1, 1, 1)
    if mask is not None:
        y = torch.where(mask[:, None, :, None, None], y, z)
    return torch.cat([y] * copies) if copies > 1 else y


def _reference_forward(
    z: Tensor,
    velocity: Tensor,
    guidance: Tensor | None,
    scale: float,
    dt: Tensor,
    mask: Tensor | None,
    copies: int,
) -> Tensor:
    """Compute what `_forward` returns."""
    chosen = scale if guidance is None else guidance
    is_guided = velocity.shape[0] != z.shape[0]
    return reference(z, velocity, chosen if is_guided else None, dt, mask, copies)


def _fake_forward(
    z: Tensor, velocity: Tensor, guidance: Any, scale: Any, dt: Any, mask: Any, copies: int
) -> Tensor:
    return z.new_empty(copies * z.shape[0], *z.shape[1:])


# The guidance of each sample is `guidance`, or `scale` for all of them where that is None.
# A velocity of z's batch is taken as it is; one of twice as many samples is guided.
_forward = Op(
    "cfg_rflow_step_forward(Tensor z, Tensor velocity, Tensor? guidance, float scale, Tensor dt, "
    "Tensor? mask, int copies) -> Tensor",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=_reference_forward,
    cuda="opensora.kernels.cfg_rflow_step:forward",
)


def cfg_rflow_step(
    z: Tensor,
    velocity: Tensor,
    guidance: Tensor | float | None,
    dt: Tensor,
    *,
    mask: Tensor | None = None,
    copies: int = 1,
) -> Tensor:
    """Advance a latent by one Euler step of a guided velocity; frames outside `mask` stay.

    Deterministic. No host synchronisation, no in-place effect. There is no backward kernel: where
    a gradient is wanted the reference serves, which autograd differentiates.

    Args:
        z: Latent [B, C, T, H, W], float32 (or float64). A kernel copies what is not contiguous.
        velocity: The model's prediction [2B, >= C, T, H, W], conditional samples first, or
            [B, >= C, T, H, W] without guidance; floating point, any strides. Channels from C on
            (a learned sigma) are not read.
        guidance: g, one number or a tensor [B] on z's device; None takes the velocity as it is.
        dt: [B], (t_i - t_{i+1}) / 1000, on z's device; cast to z's dtype.
        mask: Bool [B, T]: frames that move. The others keep z, whatever their velocity holds.
        copies: How many times the result is written along the batch, >= 1; 2 is the batch
            [cond; uncond] that a guided model sees next.

    Returns:
        [copies * B, C, T, H, W] of z's dtype; dense if z is.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `z`, or a gradient is
            wanted.

    Source: `rflow.py` of Open-Sora 1.2; guidance of Ho and Salimans, 2022.
    """
    _check(z, velocity, guidance, dt, mask, copies)
    per_sample = guidance if isinstance(guidance, Tensor) else None
    if needs_grad(z, velocity, per_sample, dt):
        if _library.mode == "require":
            raise NotImplementedError(
                "cfg_rflow_step: kernels are required, but none has gradients"
            )
        return reference(z, velocity, guidance, dt, mask, copies)
    if not _forward.serves(z):
        return reference(z, velocity, guidance, dt, mask, copies)
    if velocity.dtype not in VELOCITIES[z.device.type]:
        velocity = velocity.to(z.dtype)
    scale = 1.0 if guidance is None or per_sample is not None else float(guidance)
    y: Tensor = _forward(
        z.contiguous(), velocity, _dense(per_sample, z), scale, _dense(dt, z), mask, copies
    )
    return y


def _check(
    z: Tensor,
    velocity: Tensor,
    guidance: Tensor | float | None,
    dt: Tensor,
    mask: Tensor | None,
    copies: int,
) -> None:
    """Raise ValueError, with what was expected and what came, where arguments do not fit."""
    if z.dim() != 5 or z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z must be float32 or float64 [B, C, T, H, W], got {_describe(z)}")
    batch, channels, frames = z.shape[:3]
    rows = batch if guidance is None else 2 * batch
    if (
        velocity.dim() != 5
        or not velocity.is_floating_point()
        or velocity.shape[0] != rows
        or velocity.shape[1] < channels
        or velocity.shape[2:] != z.shape[2:]
        or velocity.device != z.device
    ):
        expected = [rows, f">= {channels}", *z.shape[2:]]
        raise ValueError(
            f"velocity must be float {expected} on {z.device}, got {_describe(velocity)}"
        )
    for name, row in (("dt", dt), ("guidance", guidance)):
        if isinstance(row, Tensor) and (
            row.shape != (batch,) or not row.is_floating_point() or row.device != z.device
        ):
            raise ValueError(
                f"{name} must be float [B = {batch}] on {z.device}, got {_describe(row)}"
            )
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape != (batch, frames) or mask.device != z.device
    ):
        raise ValueError(
            f"mask must be bool [B, T] = [{batch}, {frames}] on {z.device}, got {_describe(mask)}"
        )
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")


def _dense(row: Tensor | None, z: Tensor) -> Tensor | None:
    return None if row is None else row.to(z.dtype).contiguous()


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"
