"""Run `gate_residual` on CUDA; contract in `opensora/ops/gate_residual.py`.

Bytes: forward reads x and y and writes their sum, backward reads the gradient and y and writes dy,
each once; gates stay in cache. Tiling: a program holds a few rows of C columns that share their
gate, enough of them to read a tail of 128 columns 16 bytes at a time; backward walks a run of such
tiles and keeps that run's dgate in registers.
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
    load_tile,
    needs_int64,
    offset,
    split_row,
    store_row,
    store_tile,
)
from opensora.ops._modulation import sum_frames


@dataclass(frozen=True)
class Config:
    """Hold the launch parameters of one kernel."""

    warps: int
    tile: int  # rows that a program holds at a time
    run: int  # rows of one backward program, a multiple of `tile`

    @classmethod
    def heuristic(cls, channels: int, rows: int, itemsize: int, accesses: int) -> Config:
        """Choose by width, rows of a frame and bytes of an element; not timed yet.

        One warp up to 1152 lanes needs no barrier; above, 512 lanes a warp as in
        `layernorm_modulate`. A thread reads each operand with at most `accesses` times 16 bytes.
        Forward takes 9: two bfloat16 rows of 1152, all of x and y 16 bytes wide, 88 registers.
        Backward takes half: two rows would hold 191 registers for a gain on the tail alone, one
        holds 118. Runs of 32 rows write 2 % more bytes for the partial sums.
        """
        lanes = sum(split_row(channels))
        warps = 1 if lanes <= 1152 else min(triton.next_power_of_2(lanes // 512), 32)
        fitting = max(accesses * 16 * 32 * warps // (lanes * itemsize), 1)
        tile = min(1 << (fitting.bit_length() - 1), triton.next_power_of_2(max(rows, 1)))
        return cls(warps=warps, tile=tile, run=max(32, tile))


@triton.jit(do_not_specialize=["T", "S", "CHUNKS"])
def forward_kernel(
    x_ptr,  # [B*T*S, C] dense
    y_ptr,  # [B*T*S, C] dense
    gate_ptr,  # [B, C], dense rows `gate_stride` apart; gate0 likewise
    select_ptr,  # [B*T] bytes, read if SELECT
    gate0_ptr,  # read if SELECT
    z_ptr,  # [B*T*S, C] dense
    gate_stride,
    gate0_stride,
    T,
    S,
    CHUNKS,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    SELECT: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0)
    frame = unit // CHUNKS
    batch = frame // T
    gate_row = gate_ptr + batch * gate_stride
    if SELECT:
        if tl.load(select_ptr + frame) == 0:
            gate_row = gate0_ptr + batch * gate0_stride
    gate, gate_tail = load_row(gate_row, C, HEAD, TAIL)
    first = unit % CHUNKS * TILE
    tile = tl.arange(0, TILE)
    seen = first + tile < S
    at = offset(frame * S + first, C, INT64)
    x, x_tail = load_tile(x_ptr + at + tile * C, seen, C, HEAD, TAIL)
    y, y_tail = load_tile(y_ptr + at + tile * C, seen, C, HEAD, TAIL)
    z = x.to(tl.float32) + gate[None, :] * y.to(tl.float32)
    z_tail = x_tail.to(tl.float32) + gate_tail[None, :] * y_tail.to(tl.float32)
    store_tile(z_ptr + at + tile * C, seen, z, z_tail, C, HEAD, TAIL)


@triton.jit(do_not_specialize=["T", "S", "CHUNKS"])
def backward_kernel(
    grad_ptr,  # [B*T*S, C] dense
    y_ptr,  # [B*T*S, C] dense
    gate_ptr,  # [B, C], dense rows `gate_stride` apart; gate0 likewise
    select_ptr,  # [B*T] bytes, read if SELECT
    gate0_ptr,  # read if SELECT
    dy_ptr,  # [B*T*S, C] dense
    partial_ptr,  # [B*T*CHUNKS, C] float32: each program's dgate
    gate_stride,
    gate0_stride,
    T,
    S,
    CHUNKS,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    SELECT: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0)
    frame = unit // CHUNKS
    batch = frame // T
    gate_row = gate_ptr + batch * gate_stride
    if SELECT:
        if tl.load(select_ptr + frame) == 0:
            gate_row = gate0_ptr + batch * gate0_stride
    gate, gate_tail = load_row(gate_row, C, HEAD, TAIL)
    tile = tl.arange(0, TILE)
    # Rows are added up at the end: until then they may lie in different threads.
    dgate = tl.zeros((TILE, HEAD), tl.float32)
    dgate_tail = tl.zeros((TILE, TAIL or HEAD), tl.float32)
    first = unit % CHUNKS * RUN
    for i in range(first, tl.minimum(first + RUN, S), TILE):
        at = offset(frame * S + i, C, INT64)
        seen = i + tile < S
        y, y_tail = load_tile(y_ptr + at + tile * C, seen, C, HEAD, TAIL)
        grad, grad_tail = load_tile(grad_ptr + at + tile * C, seen, C, HEAD, TAIL)
        grad, grad_tail = grad.to(tl.float32), grad_tail.to(tl.float32)
        dy, dy_tail = grad * gate[None, :], grad_tail * gate_tail[None, :]
        store_tile(dy_ptr + at + tile * C, seen, dy, dy_tail, C, HEAD, TAIL)
        dgate += grad * y.to(tl.float32)
        dgate_tail += grad_tail * y_tail.to(tl.float32)
    sums_ptr = partial_ptr + offset(unit, C, INT64)
    store_row(sums_ptr, tl.sum(dgate, axis=0), tl.sum(dgate_tail, axis=0), C, HEAD, TAIL)


def forward(
    x: Tensor, y: Tensor, gate: Tensor, select: Tensor | None, gate0: Tensor | None
) -> Tensor:
    """Launch the forward kernel; x and y are dense, and so are the rows of the gates."""
    z = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return z
    frames, rows = _axes(x, select)
    head, tail = split_row(x.shape[-1])
    itemsize = max(x.element_size(), y.element_size())
    config = Config.heuristic(x.shape[-1], rows, itemsize, accesses=9)
    chunks = triton.cdiv(rows, config.tile)
    other = gate if gate0 is None else gate0
    with torch.cuda.device_of(x):
        forward_kernel[(x.shape[0] * frames * chunks,)](
            x,
            y,
            gate,
            x if select is None else select.view(torch.uint8),
            other,
            z,
            gate.stride(0),
            other.stride(0),
            frames,
            rows,
            chunks,
            C=x.shape[-1],
            HEAD=head,
            TAIL=tail,
            TILE=config.tile,
            SELECT=select is not None,
            INT64=needs_int64(x),
            num_warps=config.warps,
        )
    return z


def backward(
    grad: Tensor, y: Tensor, gate: Tensor, select: Tensor | None, gate0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; returns dy and dgate [B, 1 or 2, C]."""
    batch, channels = y.shape[0], y.shape[-1]
    frames, rows = _axes(y, select)
    itemsize = max(grad.element_size(), y.element_size())
    config = Config.heuristic(channels, rows, itemsize, accesses=5)
    chunks = triton.cdiv(rows, config.run)
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    partial = y.new_empty(batch, frames, chunks, 1, channels, dtype=torch.float32)
    if y.numel() > 0:
        head, tail = split_row(channels)
        other = gate if gate0 is None else gate0
        with torch.cuda.device_of(y):
            backward_kernel[(batch * frames * chunks,)](
                grad,
                y,
                gate,
                y if select is None else select.view(torch.uint8),
                other,
                dy,
                partial,
                gate.stride(0),
                other.stride(0),
                frames,
                rows,
                chunks,
                C=channels,
                HEAD=head,
                TAIL=tail,
                TILE=config.tile,
                RUN=config.run,
                SELECT=select is not None,
                INT64=needs_int64(y, partial),
                num_warps=config.warps,
            )
    return dy, sum_frames(partial.sum(2), select).to(gate.dtype)


def _axes(x: Tensor, select: Tensor | None) -> tuple[int, int]:
    """Return (T, S): the frames that choose a gate and the rows in each."""
    frames = 1 if select is None else select.shape[1]
    return frames, x.shape[1:-1].numel() // max(frames, 1)
