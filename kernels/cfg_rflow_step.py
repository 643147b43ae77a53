"""Run `cfg_rflow_step` on CUDA; contract in `opensora/ops/cfg_rflow_step.py`.

Bytes: reads z once and the first C channels of both velocities once, writes every copy once.
Tiling: a program takes BLOCK elements of one sample in the order of z; a velocity whose first C
channels lie so too is read with the same wide accesses, any other by its strides.
Axes: B batch, C channels, T frames, H x W pixels, SIZE = C*T*H*W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora.kernels._tl import needs_int64, offset


@dataclass(frozen=True)
class Config:
    """Hold the launch parameters of the kernel."""

    block: int
    warps: int

    @classmethod
    def heuristic(cls) -> Config:
        """Choose one size for every latent; counted for sm_80, 90 and 100, not timed yet.

        Eight elements a thread read a bfloat16 velocity 16 bytes at a time and make 373 programs of
        the 382k elements of a 480p, 2 s latent, which 132 SMs hold at once.
        """
        return cls(block=1024, warps=4)


@triton.jit
def rounded_product(a, b):
    """Return a * b, rounded before anything is added to it.

    A plain product followed by a sum becomes one fused operation, which rounds once and so differs
    from eager PyTorch. A sum cannot be fused into this one; only -0 becomes 0.
    """
    return tl.fma(a, b, 0.0)


@triton.jit(do_not_specialize=["T", "H", "W"])
def forward_kernel(
    z_ptr,  # [B, C, T, H, W] dense
    velocity_ptr,  # [B or 2B, >= C, T, H, W], strides below
    guidance_ptr,  # [B], read if PER_SAMPLE
    dt_ptr,  # [B]
    mask_ptr,  # [B, T] bytes, read if MASK
    y_ptr,  # [COPIES, B, C, T, H, W] dense
    scale,  # guidance of every sample, if not PER_SAMPLE
    SIZE,
    T,
    H,
    W,
    B_stride,  # strides of velocity
    C_stride,
    T_stride,
    H_stride,
    W_stride,
    uncond,  # elements from a conditional velocity to its unconditional one
    copy,  # elements from a copy of y to the next
    GUIDED: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    MASK: tl.constexpr,
    DENSE: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    batch = tl.program_id(1)
    at = offset(tl.program_id(0), BLOCK, INT64) + tl.arange(0, BLOCK)
    inside = at < SIZE
    frame = at // (H * W) % T
    if DENSE:
        here = at
    else:
        here = at // (T * H * W) * C_stride + frame * T_stride
        here += at // W % H * H_stride + at % W * W_stride
    velocity_ptr += offset(batch, B_stride, INT64)
    v = tl.load(velocity_ptr + here, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        g = scale
        if PER_SAMPLE:
            g = tl.load(guidance_ptr + batch)
        u = tl.load(velocity_ptr + uncond + here, mask=inside, other=0.0).to(tl.float32)
        v = u + rounded_product(v - u, g)
    start = offset(batch, SIZE, INT64)
    z = tl.load(z_ptr + start + at, mask=inside, other=0.0)
    y = z + rounded_product(v, tl.load(dt_ptr + batch))
    if MASK:
        moves = tl.load(mask_ptr + batch * T + frame, mask=inside, other=0)
        y = tl.where(moves != 0, y, z)
    y_ptr += start
    for _ in tl.static_range(COPIES):
        tl.store(y_ptr + at, y, mask=inside)
        y_ptr += copy


def forward(
    z: Tensor,
    velocity: Tensor,
    guidance: Tensor | None,
    scale: float,
    dt: Tensor,
    mask: Tensor | None,
    copies: int,
) -> Tensor:
    """Launch the kernel; z, guidance and dt are dense float32."""
    batch, _, frames, height, width = z.shape
    y = z.new_empty(copies * batch, *z.shape[1:])
    if z.numel() == 0:
        return y
    size = z[0].numel()
    strides = velocity.stride()
    config = Config.heuristic()
    with torch.cuda.device_of(z):
        forward_kernel[(triton.cdiv(size, config.block), batch)](
            z,
            velocity,
            z if guidance is None else guidance,
            dt,
            z if mask is None else mask.contiguous().view(torch.uint8),
            y,
            scale,
            size,
            frames,
            height,
            width,
            *strides,
            batch * strides[0],
            batch * size,
            GUIDED=velocity.shape[0] != batch,
            PER_SAMPLE=guidance is not None,
            MASK=mask is not None,
            DENSE=velocity[0, : z.shape[1]].is_contiguous(),
            COPIES=copies,
            BLOCK=config.block,
            # The last program's lanes may pass the end of a sample.
            INT64=needs_int64(velocity, y) or size > 2**31 - config.block,
            num_warps=config.warps,
        )
    return y
