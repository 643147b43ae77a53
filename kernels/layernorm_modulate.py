"""Run `layernorm_modulate` on CUDA; contract in `opensora/ops/layernorm_modulate.py`.

Bytes: forward reads x and writes y, backward reads dy and x and writes dx, each once; shift and
scale stay in cache. Tiling: forward holds one row of C columns per program, backward walks a run
of rows that share their modulation and keeps that run's dshift and dscale in registers.
Axes: B batch, T frames (1 without `select`), S rows per frame, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora.kernels._tl import (
    load_row,
    needs_int64,
    normalise_row,
    offset,
    split_row,
    store_row,
    sum_row,
)


@dataclass(frozen=True)
class Config:
    """Hold the launch parameters of both kernels."""

    forward_warps: int
    backward_warps: int
    rows: int  # of one backward program

    @classmethod
    def heuristic(cls, channels: int) -> Config:
        """Choose by width, from counts compiled for sm_80, 90 and 100 (Triton 3.7); not timed yet.

        Forward, at most 1536 lanes a warp: 71 registers at C = 1152, no barrier, every access 8 or
        16 bytes wide; with 4 warps the tail of 128 would be loaded 2 bytes at a time. Backward
        holds five rows: one warp spills nothing up to C = 1152 (234 registers) and much at 2048;
        512 lanes a warp take at most 128. 32 rows make 1491 programs of the 47.7k tokens of a
        480p, 2 s request, more than the 9 per SM that 132 SMs hold, for 4 % more bytes.
        """
        lanes = sum(split_row(channels))
        backward = 1 if lanes <= 1152 else triton.next_power_of_2(lanes // 512)
        return cls(
            forward_warps=min(triton.next_power_of_2(lanes // 1024), 16) or 1,
            backward_warps=min(backward, 32),
            rows=32,
        )


@triton.jit(do_not_specialize=["T", "S"])
def forward_kernel(
    x_ptr,  # [B*T*S, C] dense
    shift_ptr,  # [B, C], dense rows `shift_stride` apart; shift0 and both scales likewise
    scale_ptr,
    select_ptr,  # [B*T] bytes, read if SELECT
    shift0_ptr,  # read if SELECT, like scale0
    scale0_ptr,
    y_ptr,  # [B*T*S, C] dense
    shift_stride,
    scale_stride,
    shift0_stride,
    scale0_stride,
    T,
    S,
    eps,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    SELECT: tl.constexpr,
    INT64: tl.constexpr,
):
    row = tl.program_id(0)
    frame = row // S
    batch = frame // T
    x, x_tail = load_row(x_ptr + offset(row, C, INT64), C, HEAD, TAIL)
    n, n_tail, _ = normalise_row(x, x_tail, eps, C, HEAD, TAIL)
    shift_row = shift_ptr + batch * shift_stride
    scale_row = scale_ptr + batch * scale_stride
    if SELECT:
        if tl.load(select_ptr + frame) == 0:
            shift_row = shift0_ptr + batch * shift0_stride
            scale_row = scale0_ptr + batch * scale0_stride
    shift, shift_tail = load_row(shift_row, C, HEAD, TAIL)
    scale, scale_tail = load_row(scale_row, C, HEAD, TAIL)
    y, y_tail = n * (1 + scale) + shift, n_tail * (1 + scale_tail) + shift_tail
    store_row(y_ptr + offset(row, C, INT64), y, y_tail, C, HEAD, TAIL)


@triton.jit(do_not_specialize=["T", "S", "CHUNKS"])
def backward_kernel(
    dy_ptr,  # [B*T*S, C] dense
    x_ptr,  # [B*T*S, C] dense
    scale_ptr,  # [B, C], dense rows `scale_stride` apart; scale0 likewise
    select_ptr,  # [B*T] bytes, read if SELECT
    scale0_ptr,  # read if SELECT
    dx_ptr,  # [B*T*S, C] dense
    partial_ptr,  # [B*T*CHUNKS, 2, C] float32: each program's dshift and dscale
    scale_stride,
    scale0_stride,
    T,
    S,
    CHUNKS,
    eps,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    SELECT: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0)
    frame = unit // CHUNKS
    batch = frame // T
    scale_row = scale_ptr + batch * scale_stride
    if SELECT:
        if tl.load(select_ptr + frame) == 0:
            scale_row = scale0_ptr + batch * scale0_stride
    scale, scale_tail = load_row(scale_row, C, HEAD, TAIL)
    dshift, dshift_tail = tl.zeros_like(scale), tl.zeros_like(scale_tail)
    dscale, dscale_tail = tl.zeros_like(scale), tl.zeros_like(scale_tail)
    first = unit % CHUNKS * ROWS
    for i in range(first, tl.minimum(first + ROWS, S)):
        at = offset(frame * S + i, C, INT64)
        x, x_tail = load_row(x_ptr + at, C, HEAD, TAIL)
        dy, dy_tail = load_row(dy_ptr + at, C, HEAD, TAIL)
        n, n_tail, rstd = normalise_row(x, x_tail, eps, C, HEAD, TAIL)
        g, g_tail = dy * (1 + scale), dy_tail * (1 + scale_tail)
        mean_g = sum_row(g, g_tail, TAIL) / C
        mean_gn = sum_row(g * n, g_tail * n_tail, TAIL) / C
        dx = rstd * (g - mean_g - n * mean_gn)
        dx_tail = rstd * (g_tail - mean_g - n_tail * mean_gn)
        store_row(dx_ptr + at, dx, dx_tail, C, HEAD, TAIL)
        dshift += dy
        dshift_tail += dy_tail
        dscale += dy * n
        dscale_tail += dy_tail * n_tail
    sums_ptr = partial_ptr + offset(unit, 2 * C, INT64)
    store_row(sums_ptr, dshift, dshift_tail, C, HEAD, TAIL)
    store_row(sums_ptr + C, dscale, dscale_tail, C, HEAD, TAIL)


def forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    select: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> Tensor:
    """Launch the forward kernel; x is dense, and so are the rows of shift and scale."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    frames, rows = _axes(x, select)
    head, tail = split_row(x.shape[-1])
    others = (shift, scale) if shift0 is None or scale0 is None else (shift0, scale0)
    with torch.cuda.device_of(x):
        forward_kernel[(x.shape[0] * frames * rows,)](
            x,
            shift,
            scale,
            x if select is None else select.view(torch.uint8),
            *others,
            y,
            shift.stride(0),
            scale.stride(0),
            others[0].stride(0),
            others[1].stride(0),
            frames,
            rows,
            eps,
            C=x.shape[-1],
            HEAD=head,
            TAIL=tail,
            SELECT=select is not None,
            INT64=needs_int64(x),
            num_warps=Config.heuristic(x.shape[-1]).forward_warps,
        )
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    select: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; returns dx and dmodulation [B, 2 or 4, C]."""
    batch, channels = x.shape[0], x.shape[-1]
    frames, rows = _axes(x, select)
    config = Config.heuristic(channels)
    chunks = triton.cdiv(rows, config.rows)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    partial = x.new_empty(batch, frames, chunks, 2, channels, dtype=torch.float32)
    if x.numel() > 0:
        head, tail = split_row(channels)
        other = scale if scale0 is None else scale0
        with torch.cuda.device_of(x):
            backward_kernel[(batch * frames * chunks,)](
                dy,
                x,
                scale,
                x if select is None else select.view(torch.uint8),
                other,
                dx,
                partial,
                scale.stride(0),
                other.stride(0),
                frames,
                rows,
                chunks,
                eps,
                C=channels,
                HEAD=head,
                TAIL=tail,
                ROWS=config.rows,
                SELECT=select is not None,
                INT64=needs_int64(x, partial),
                num_warps=config.backward_warps,
            )
    sums = partial.sum(2)  # [B, T, 2, C]
    if select is None:
        dmodulation = sums.sum(1)
    else:
        # where, not a product: a frame that overflowed stays out of the other modulation's sum.
        chosen = select[:, :, None, None]
        parts = (torch.where(chosen, sums, 0).sum(1), torch.where(chosen, 0, sums).sum(1))
        dmodulation = torch.cat(parts, dim=1)
    return dx, dmodulation.to(x.dtype)


def _axes(x: Tensor, select: Tensor | None) -> tuple[int, int]:
    """Return (T, S): the frames that choose a modulation and the rows in each."""
    frames = 1 if select is None else select.shape[1]
    return frames, x.shape[1:-1].numel() // max(frames, 1)
