"""Run `spatial_attention` on CUDA; contract in `opensora/ops/spatial_attention.py`.

Bytes: forward reads q, k, v where they lie in qkv and writes o, each once where the keys of a frame
stay in cache; with norms it reads k once more for its 1 / rms, 4 bytes a row. Backward reads q, k,
v, dy, o and writes dq, dk, dv. Tiling: forward and dq hold M queries of a head and stream its keys
by N; dk and dv hold M keys and stream queries. dq runs first and leaves sum(dy * o) to the other.
Axes: B batch, T frames, S tokens per frame, H heads, D head width; unit = (B*T + T) * H + H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora.kernels._flash import (
    LOG2E,
    Tile,
    attend,
    fold_weights,
    inverse_rms,
    key_gradient,
    load_rows,
    norm_gradient,
    query_gradient,
    split_head,
)
from opensora.kernels._tl import needs_int64, offset, store_tile, sum_tile

MAX_WIDTH = 128


@dataclass(frozen=True)
class Config:
    """Hold the tiles of the three kernels."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile

    @classmethod
    def heuristic(cls, width: int, dtype: torch.dtype) -> Config:
        """Choose by width, from counts compiled for sm_80, 90 and 100 (Triton 3.7); not timed yet.

        At D = 72 the forward takes 128 registers on sm_90 without norms, so two programs share an
        SM, and 183 with them; a third stage would take 221. With 4 warps it spills. Backward steps
        of 64 spill on sm_80 at 8 warps, steps of 32 nowhere. D = 128 spills at 128 rows in the
        backward. float32 products run on no tensor core and hold operands in registers.
        """
        if dtype == torch.float32:
            tile, less = Tile(32, 32, warps=4, stages=1), Tile(32, 16, warps=4, stages=1)
            return cls(forward=tile, query_gradient=less, key_gradient=tile)
        return cls(
            forward=Tile(128, 64, warps=8, stages=2),
            query_gradient=Tile(128 if width <= 80 else 64, 32, warps=8, stages=2),
            key_gradient=Tile(128 if width <= 80 else 64, 32, warps=8, stages=2),
        )


@triton.jit
def _place(
    unit, T, stride_b, stride_t, H: tl.constexpr, STRIDE_H: tl.constexpr, INT64: tl.constexpr
):
    """Return the offset in qkv of a unit's first query."""
    frame = unit // H
    at = offset(frame // T, stride_b, INT64) + offset(frame % T, stride_t, INT64)
    return at + offset(unit % H, STRIDE_H, INT64)


@triton.jit(do_not_specialize=["T", "S", "TILES"])
def rstd_kernel(
    qkv_ptr,  # [B, T, S, 3, H, D], dense D
    rstd_ptr,  # [B*T*H, S] float32: 1 / rms of k
    stride_b,
    stride_t,
    stride_s,
    stride_k,
    T,
    S,
    TILES,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0) // TILES
    rows = tl.program_id(0) % TILES * M + tl.arange(0, M)
    at = qkv_ptr + _place(unit, T, stride_b, stride_t, H, STRIDE_H, INT64) + stride_k
    k, k_tail = load_rows(at, rows, stride_s, S, D, HEAD, TAIL, INT64)
    rstd = inverse_rms(k, k_tail, eps, D, TAIL)
    tl.store(rstd_ptr + offset(unit, S, INT64) + rows, rstd, mask=rows < S)


@triton.jit(do_not_specialize=["T", "S", "TILES"])
def forward_kernel(
    qkv_ptr,  # [B, T, S, 3, H, D], dense D
    q_weight_ptr,  # [D], read if NORM, like k_weight
    k_weight_ptr,
    o_ptr,  # [B*T, S, H, D] dense
    stats_ptr,  # [1 or 3, B*T*H, S] float32, B*T*H*S apart: lse, 1 / rms of q, of k
    stride_b,
    stride_t,
    stride_s,
    stride_k,
    T,
    S,
    TILES,
    eps,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NORM: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0) // TILES
    rows = tl.program_id(0) % TILES * M + tl.arange(0, M)
    at = qkv_ptr + _place(unit, T, stride_b, stride_t, H, STRIDE_H, INT64)
    plane = tl.num_programs(0) // TILES * S
    stats_ptr += offset(unit, S, INT64)
    q, q_tail = load_rows(at, rows, stride_s, S, D, HEAD, TAIL, INT64)
    if NORM:
        rstd = inverse_rms(q, q_tail, eps, D, TAIL)
        tl.store(stats_ptr + plane + rows, rstd, mask=rows < S)
        q, q_tail = fold_weights(q, q_tail, rstd, q_weight_ptr, k_weight_ptr, D, HEAD, TAIL)
    k_ptr, factor_ptr = at + stride_k, stats_ptr + 2 * plane
    v_ptr = k_ptr + stride_k  # twice the stride may pass 2^31
    o, o_tail, lse = attend(
        q, q_tail, k_ptr, v_ptr, factor_ptr, stride_s, S, scale, D, HEAD, TAIL, N, NORM, INT64
    )
    tl.store(stats_ptr + rows, lse, mask=rows < S)
    at = o_ptr + offset(unit // H, S * H * D, INT64) + unit % H * D
    store_tile(at + offset(rows, H * D, INT64), rows < S, o, o_tail, D, HEAD, TAIL)


@triton.jit(do_not_specialize=["T", "S", "TILES"])
def query_gradient_kernel(
    do_ptr,  # [B*T, S, H, D] dense, like o
    qkv_ptr,  # [B, T, S, 3, H, D], dense D
    q_weight_ptr,  # [D], read if NORM, like k_weight
    k_weight_ptr,
    o_ptr,
    stats_ptr,  # [1 or 3, B*T*H, S] float32, B*T*H*S apart: lse, 1 / rms of q, of k
    dqkv_ptr,  # [B*T, S, 3, H, D] dense: dq is written
    delta_ptr,  # [B*T*H, S] float32: sum of do * o, written
    partial_ptr,  # [B*T*H, TILES, D] float32: shares of dq_weight, written if NORM
    stride_b,
    stride_t,
    stride_s,
    stride_k,
    T,
    S,
    TILES,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NORM: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0) // TILES
    rows = tl.program_id(0) % TILES * M + tl.arange(0, M)
    at = qkv_ptr + _place(unit, T, stride_b, stride_t, H, STRIDE_H, INT64)
    plane = tl.num_programs(0) // TILES * S
    stats_ptr += offset(unit, S, INT64)
    o_place = offset(unit // H, S * H * D, INT64) + unit % H * D
    o, o_tail = load_rows(o_ptr + o_place, rows, H * D, S, D, HEAD, TAIL, INT64)
    do, do_tail = load_rows(do_ptr + o_place, rows, H * D, S, D, HEAD, TAIL, INT64)
    delta = sum_tile(
        o.to(tl.float32) * do.to(tl.float32), o_tail.to(tl.float32) * do_tail.to(tl.float32), TAIL
    )
    tl.store(delta_ptr + offset(unit, S, INT64) + rows, delta, mask=rows < S)
    lse = tl.load(stats_ptr + rows, mask=rows < S, other=0.0)
    q, q_tail = load_rows(at, rows, stride_s, S, D, HEAD, TAIL, INT64)
    if NORM:
        rstd = tl.load(stats_ptr + plane + rows, mask=rows < S, other=0.0)
        q, q_tail = fold_weights(q, q_tail, rstd, q_weight_ptr, k_weight_ptr, D, HEAD, TAIL)
    dq, dq_tail = query_gradient(
        q,
        q_tail,
        do,
        do_tail,
        lse,
        delta,
        at + stride_k,
        at + stride_k + stride_k,
        stats_ptr + 2 * plane,
        stride_s,
        S,
        scale,
        D,
        HEAD,
        TAIL,
        N,
        NORM,
        INT64,
    )
    if NORM:
        # Read again: held through the loop, the raw queries would take 40 registers more.
        q, q_tail = load_rows(at, rows, stride_s, S, D, HEAD, TAIL, INT64)
        rstd = tl.load(stats_ptr + plane + rows, mask=rows < S, other=0.0)
        share_ptr = partial_ptr + offset(tl.program_id(0), D, INT64)
        dq, dq_tail = norm_gradient(
            dq, dq_tail, q, q_tail, rstd, q_weight_ptr, k_weight_ptr, share_ptr, D, HEAD, TAIL
        )
    at = dqkv_ptr + offset(unit // H, S * 3 * H * D, INT64) + unit % H * D
    store_tile(at + offset(rows, 3 * H * D, INT64), rows < S, dq, dq_tail, D, HEAD, TAIL)


@triton.jit(do_not_specialize=["T", "S", "TILES"])
def key_gradient_kernel(
    do_ptr,  # [B*T, S, H, D] dense
    qkv_ptr,  # [B, T, S, 3, H, D], dense D
    q_weight_ptr,  # [D], read if NORM, like k_weight
    k_weight_ptr,
    stats_ptr,  # [1 or 3, B*T*H, S] float32, B*T*H*S apart: lse, 1 / rms of q, of k
    delta_ptr,  # [B*T*H, S] float32: sum of do * o
    dqkv_ptr,  # [B*T, S, 3, H, D] dense: dk and dv are written
    partial_ptr,  # [B*T*H, TILES, D] float32: shares of dk_weight, written if NORM
    stride_b,
    stride_t,
    stride_s,
    stride_k,
    T,
    S,
    TILES,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NORM: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0) // TILES
    rows = tl.program_id(0) % TILES * M + tl.arange(0, M)
    at = qkv_ptr + _place(unit, T, stride_b, stride_t, H, STRIDE_H, INT64)
    plane = tl.num_programs(0) // TILES * S
    stats_ptr += offset(unit, S, INT64)
    k_at, v_at = at + stride_k, at + stride_k + stride_k
    k, k_tail = load_rows(k_at, rows, stride_s, S, D, HEAD, TAIL, INT64)
    v, v_tail = load_rows(v_at, rows, stride_s, S, D, HEAD, TAIL, INT64)
    if NORM:
        rstd = tl.load(stats_ptr + 2 * plane + rows, mask=rows < S, other=0.0)
        k, k_tail = fold_weights(k, k_tail, rstd, k_weight_ptr, q_weight_ptr, D, HEAD, TAIL)
    dk, dk_tail, dv, dv_tail = key_gradient(
        k,
        k_tail,
        v,
        v_tail,
        at,
        do_ptr + offset(unit // H, S * H * D, INT64) + unit % H * D,
        stats_ptr + plane,
        stats_ptr,
        delta_ptr + offset(unit, S, INT64),
        stride_s,
        H * D,
        0,
        S,
        scale,
        D,
        HEAD,
        TAIL,
        N,
        NORM,
        INT64,
    )
    at = dqkv_ptr + offset(unit // H, S * 3 * H * D, INT64) + unit % H * D
    at += offset(rows, 3 * H * D, INT64)
    store_tile(at + 2 * H * D, rows < S, dv, dv_tail, D, HEAD, TAIL)
    if NORM:
        seen = (rows < S)[:, None]  # past the end weights may be infinite
        dk, dk_tail = tl.where(seen, dk, 0.0), tl.where(seen, dk_tail, 0.0)
        k, k_tail = load_rows(k_at, rows, stride_s, S, D, HEAD, TAIL, INT64)
        rstd = tl.load(stats_ptr + 2 * plane + rows, mask=rows < S, other=0.0)
        share_ptr = partial_ptr + offset(tl.program_id(0), D, INT64)
        dk, dk_tail = norm_gradient(
            dk, dk_tail, k, k_tail, rstd, k_weight_ptr, q_weight_ptr, share_ptr, D, HEAD, TAIL
        )
    store_tile(at + H * D, rows < S, dk, dk_tail, D, HEAD, TAIL)


def forward(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; returns o [B, T, S, H*D] and stats [1 or 3, B, T, H, S]."""
    batch, frames, tokens, _, heads, width = qkv.shape
    norm = q_weight is not None
    o = qkv.new_empty(batch, frames, tokens, heads * width)
    stats = qkv.new_empty(3 if norm else 1, batch, frames, heads, tokens, dtype=torch.float32)
    if qkv.numel() == 0:
        return o, stats
    tile = Config.heuristic(width, qkv.dtype).forward
    sizes, constants = _arguments(qkv, tile)
    weights = (qkv, qkv) if q_weight is None or k_weight is None else (q_weight, k_weight)
    units = batch * frames * heads
    with torch.cuda.device_of(qkv):
        if norm:
            rows = 128
            tiles = triton.cdiv(tokens, rows)
            rstd_kernel[(units * tiles,)](
                qkv, stats[2], *sizes[:-1], tiles, eps, M=rows, **constants, num_warps=4
            )
        forward_kernel[(units * sizes[-1],)](
            qkv,
            *weights,
            o,
            stats,
            *sizes,
            eps,
            LOG2E / width**0.5,
            M=tile.rows,
            N=tile.streamed,
            NORM=norm,
            **constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return o, stats


def backward(
    do: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    o: Tensor,
    stats: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch both backward kernels; returns dqkv and dweights [2, D] float32, or empty.

    `eps` is not read: it is in `stats`.
    """
    batch, frames, _, _, heads, width = qkv.shape
    norm = q_weight is not None
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if qkv.numel() == 0:
        return dqkv, stats.new_zeros((2, width) if norm else (0, 0))
    delta = torch.empty_like(stats[0])
    weights = (qkv, qkv) if q_weight is None or k_weight is None else (q_weight, k_weight)
    units = batch * frames * heads
    config = Config.heuristic(width, qkv.dtype)
    launches = (
        (query_gradient_kernel, config.query_gradient, (o, stats, dqkv, delta)),
        (key_gradient_kernel, config.key_gradient, (stats, delta, dqkv)),
    )
    shares = []
    with torch.cuda.device_of(qkv):
        for kernel, tile, others in launches:
            sizes, constants = _arguments(qkv, tile)
            shares.append(stats.new_empty(units * sizes[-1] if norm else 0, width))
            kernel[(units * sizes[-1],)](
                do,
                qkv,
                *weights,
                *others,
                shares[-1],
                *sizes,
                LOG2E / width**0.5,
                M=tile.rows,
                N=tile.streamed,
                NORM=norm,
                **constants,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    dweights = torch.stack([share.sum(0) for share in shares]) if norm else stats.new_empty(0, 0)
    return dqkv, dweights


def _arguments(qkv: Tensor, tile: Tile) -> tuple[list[int], dict[str, int]]:
    """Return what every kernel takes: strides, T, S and TILES; and the constants."""
    _, frames, tokens, _, heads, width = qkv.shape
    stride_b, stride_t, stride_s, stride_k, stride_h, stride_d = qkv.stride()
    if stride_d != 1 and width > 1:
        raise ValueError(f"qkv must be dense in its last axis, got strides {list(qkv.stride())}")
    if width > MAX_WIDTH:
        raise NotImplementedError(f"heads must be at most {MAX_WIDTH} wide, got {width}")
    head, tail = split_head(width)
    tiles = triton.cdiv(tokens, tile.rows)
    constants = {
        "H": heads,
        "D": width,
        "STRIDE_H": stride_h,
        "HEAD": head,
        "TAIL": tail,
        "INT64": needs_int64(qkv) or qkv.numel() > 2**31,
    }
    return [stride_b, stride_t, stride_s, stride_k, frames, tokens, tiles], constants
