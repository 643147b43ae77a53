"""Run `residual_layernorm_modulate` on CUDA; contract in its file of `opensora/ops`.

Bytes: forward reads x and y and writes the sum and the modulated norm; backward reads the gradients
of both, the sum and y and writes dx and dy, each once (without gate neither y nor dy). Modulations
stay in cache. Tiling: forward holds one row of C columns per program, backward walks a run of rows
that share their modulation and keeps that run's dgate, dshift and dscale in registers.
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
from opensora.ops._modulation import sum_frames


@dataclass(frozen=True)
class Config:
    """Hold the launch parameters of both kernels."""

    forward_warps: int
    backward_warps: int
    rows: int  # of one backward program

    @classmethod
    def heuristic(cls, channels: int, itemsize: int) -> Config:
        """Choose by width, from counts compiled for sm_80, 90 and 100 (Triton 3.7); not timed yet.

        Forward, at most 1536 lanes a warp: 80 registers at C = 1152, no barrier. Backward has two
        rows and three sums: at C = 1152 one warp of 2-byte elements holds them in 254 registers and
        spills none. Two warps would load the tail 4 bytes at a time and meet at 36 barriers; they
        serve float32, whose tail is 8 bytes then, and which one warp spills. Above, 1024 bytes of a
        row to a warp. 32 rows make 1491 programs of the 47.7k tokens of a 480p, 2 s request, and
        their partial sums are 3 % more bytes.
        """
        lanes = sum(split_row(channels))
        if lanes <= 1152:
            backward = 1 if lanes * itemsize <= 2304 else 2
        else:
            backward = triton.next_power_of_2(lanes * itemsize // 1024)
        return cls(
            forward_warps=min(triton.next_power_of_2(lanes // 1024), 16) or 1,
            backward_warps=min(backward, 32),
            rows=32,
        )


@triton.jit(do_not_specialize=["T", "S"])
def forward_kernel(
    x_ptr,  # [B*T*S, C] dense
    y_ptr,  # [B*T*S, C] dense
    gate_ptr,  # [B, C], dense rows `gate_stride` apart, read if GATE; the next five likewise
    shift_ptr,
    scale_ptr,
    select_ptr,  # [B*T] bytes, read if SELECT
    gate0_ptr,  # read if SELECT and GATE
    shift0_ptr,  # read if SELECT, like scale0
    scale0_ptr,
    sum_ptr,  # [B*T*S, C] dense
    normed_ptr,  # [B*T*S, C] dense
    gate_stride,
    shift_stride,
    scale_stride,
    gate0_stride,
    shift0_stride,
    scale0_stride,
    T,
    S,
    eps,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    GATE: tl.constexpr,
    SELECT: tl.constexpr,
    INT64: tl.constexpr,
):
    row = tl.program_id(0)
    frame = row // S
    batch = frame // T
    gate_row = gate_ptr + batch * gate_stride
    shift_row = shift_ptr + batch * shift_stride
    scale_row = scale_ptr + batch * scale_stride
    if SELECT:
        if tl.load(select_ptr + frame) == 0:
            gate_row = gate0_ptr + batch * gate0_stride
            shift_row = shift0_ptr + batch * shift0_stride
            scale_row = scale0_ptr + batch * scale0_stride
    at = offset(row, C, INT64)
    x, x_tail = load_row(x_ptr + at, C, HEAD, TAIL)
    y, y_tail = load_row(y_ptr + at, C, HEAD, TAIL)
    if GATE:
        gate, gate_tail = load_row(gate_row, C, HEAD, TAIL)
        y *= gate
        y_tail *= gate_tail
    # The norm is taken of what the next reader of the sum will see.
    total = (x + y).to(sum_ptr.dtype.element_ty)
    total_tail = (x_tail + y_tail).to(sum_ptr.dtype.element_ty)
    store_row(sum_ptr + at, total, total_tail, C, HEAD, TAIL)
    n, n_tail = total.to(tl.float32), total_tail.to(tl.float32)
    n, n_tail, _ = normalise_row(n, n_tail, eps, C, HEAD, TAIL)
    shift, shift_tail = load_row(shift_row, C, HEAD, TAIL)
    scale, scale_tail = load_row(scale_row, C, HEAD, TAIL)
    out, out_tail = n * (1 + scale) + shift, n_tail * (1 + scale_tail) + shift_tail
    store_row(normed_ptr + at, out, out_tail, C, HEAD, TAIL)


@triton.jit(do_not_specialize=["T", "S", "CHUNKS"])
def backward_kernel(
    dsum_ptr,  # [B*T*S, C] dense, read if DSUM
    dnormed_ptr,  # [B*T*S, C] dense
    sum_ptr,  # [B*T*S, C] dense
    y_ptr,  # [B*T*S, C] dense, read if GATE
    gate_ptr,  # [B, C], dense rows `gate_stride` apart, read if GATE; the next four likewise
    scale_ptr,
    select_ptr,  # [B*T] bytes, read if SELECT
    gate0_ptr,  # read if SELECT and GATE
    scale0_ptr,  # read if SELECT
    dx_ptr,  # [B*T*S, C] dense
    dy_ptr,  # [B*T*S, C] dense, written if GATE
    partial_ptr,  # [B*T*CHUNKS, 3 or 2, C] float32: each program's dgate (if GATE), dshift, dscale
    gate_stride,
    scale_stride,
    gate0_stride,
    scale0_stride,
    T,
    S,
    CHUNKS,
    eps,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    GATE: tl.constexpr,
    DSUM: tl.constexpr,
    SELECT: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0)
    frame = unit // CHUNKS
    batch = frame // T
    gate_row = gate_ptr + batch * gate_stride
    scale_row = scale_ptr + batch * scale_stride
    if SELECT:
        if tl.load(select_ptr + frame) == 0:
            gate_row = gate0_ptr + batch * gate0_stride
            scale_row = scale0_ptr + batch * scale0_stride
    dshift = tl.zeros((HEAD,), tl.float32)
    dshift_tail = tl.zeros((TAIL or HEAD,), tl.float32)
    dscale, dscale_tail = dshift, dshift_tail
    dgate, dgate_tail = dshift, dshift_tail
    first = unit % CHUNKS * ROWS
    for i in range(first, tl.minimum(first + ROWS, S)):
        at = offset(frame * S + i, C, INT64)
        n, n_tail = load_row(sum_ptr + at, C, HEAD, TAIL)
        dn, dn_tail = load_row(dnormed_ptr + at, C, HEAD, TAIL)
        n, n_tail, rstd = normalise_row(n, n_tail, eps, C, HEAD, TAIL)
        # Loaded in every turn, like gate: neither has registers to stay in.
        scale, scale_tail = load_row(scale_row, C, HEAD, TAIL)
        g, g_tail = dn + dn * scale, dn_tail + dn_tail * scale_tail
        mean_g = sum_row(g, g_tail, TAIL) / C
        mean_gn = sum_row(g * n, g_tail * n_tail, TAIL) / C
        slope, shared = -rstd * mean_gn, -rstd * mean_g
        dx = rstd * g + (slope * n + shared)
        dx_tail = rstd * g_tail + (slope * n_tail + shared)
        if DSUM:
            dsum, dsum_tail = load_row(dsum_ptr + at, C, HEAD, TAIL)
            dx += dsum
            dx_tail += dsum_tail
        store_row(dx_ptr + at, dx, dx_tail, C, HEAD, TAIL)
        if GATE:
            # In this order: no load passes a store, so that y waits until gate needs no registers.
            gate, gate_tail = load_row(gate_row, C, HEAD, TAIL)
            store_row(dy_ptr + at, dx * gate, dx_tail * gate_tail, C, HEAD, TAIL)
            y, y_tail = load_row(y_ptr + at, C, HEAD, TAIL)
            dgate += dx * y
            dgate_tail += dx_tail * y_tail
        # Read again, from the cache: it need not stay in registers beside gate and y.
        dn, dn_tail = load_row(dnormed_ptr + at, C, HEAD, TAIL)
        dshift += dn
        dshift_tail += dn_tail
        dscale += dn * n
        dscale_tail += dn_tail * n_tail
    sums_ptr = partial_ptr + offset(unit, (3 if GATE else 2) * C, INT64)
    if GATE:
        store_row(sums_ptr, dgate, dgate_tail, C, HEAD, TAIL)
        sums_ptr += C
    store_row(sums_ptr, dshift, dshift_tail, C, HEAD, TAIL)
    store_row(sums_ptr + C, dscale, dscale_tail, C, HEAD, TAIL)


def forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    select: Tensor | None,
    gate0: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; x and y are dense, and so are the rows of the modulations."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = torch.empty_like(total)
    if x.numel() == 0:
        return total, normed
    frames, rows = _axes(x, select)
    head, tail = split_row(x.shape[-1])
    modulations = [_or(gate, shift), shift, scale]
    modulations += [_or(gate0, shift), _or(shift0, shift), _or(scale0, scale)]
    with torch.cuda.device_of(x):
        forward_kernel[(x.shape[0] * frames * rows,)](
            x,
            y,
            *modulations[:3],
            x if select is None else select.view(torch.uint8),
            *modulations[3:],
            total,
            normed,
            *(m.stride(0) for m in modulations),
            frames,
            rows,
            eps,
            C=x.shape[-1],
            HEAD=head,
            TAIL=tail,
            GATE=gate is not None,
            SELECT=select is not None,
            INT64=needs_int64(x),
            num_warps=Config.heuristic(x.shape[-1], x.element_size()).forward_warps,
        )
    return total, normed


def backward(
    dsum: Tensor | None,
    dnormed: Tensor,
    total: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    select: Tensor | None,
    gate0: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel; returns dx, dy (empty without gate) and dmodulation."""
    batch, channels = total.shape[0], total.shape[-1]
    frames, rows = _axes(total, select)
    config = Config.heuristic(channels, total.element_size())
    chunks = triton.cdiv(rows, config.rows)
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    dy = total.new_empty(0)
    if gate is not None and y is not None:
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    sums = 2 if gate is None else 3
    partial = total.new_empty(batch, frames, chunks, sums, channels, dtype=torch.float32)
    if total.numel() > 0:
        head, tail = split_row(channels)
        modulations = [_or(gate, scale), scale, _or(gate0, scale), _or(scale0, scale)]
        with torch.cuda.device_of(total):
            backward_kernel[(batch * frames * chunks,)](
                _or(dsum, total),
                dnormed,
                total,
                _or(y, total),
                *modulations[:2],
                total if select is None else select.view(torch.uint8),
                *modulations[2:],
                dx,
                dx if gate is None else dy,
                partial,
                *(m.stride(0) for m in modulations),
                frames,
                rows,
                chunks,
                eps,
                C=channels,
                HEAD=head,
                TAIL=tail,
                ROWS=config.rows,
                GATE=gate is not None,
                DSUM=dsum is not None,
                SELECT=select is not None,
                INT64=needs_int64(total, partial),
                num_warps=config.backward_warps,
            )
    return dx, dy, sum_frames(partial.sum(2), select).to(total.dtype)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor, or another to stand for one that the kernel will not read."""
    return other if tensor is None else tensor


def _axes(x: Tensor, select: Tensor | None) -> tuple[int, int]:
    """Return (T, S): the frames that choose their modulation and the rows in each."""
    frames = 1 if select is None else select.shape[1]
    return frames, x.shape[1:-1].numel() // max(frames, 1)
