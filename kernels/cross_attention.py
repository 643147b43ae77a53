"""Run `cross_attention` on CUDA; contract in `opensora/ops/cross_attention.py`.

Bytes: forward reads q and writes y once; the keys and values of a sample, 86 KB a head at most,
stay in cache. Backward reads q, dy and y, then q and dy once per tile of keys, and writes dq; dk
and dv are summed in float32. Tiling: forward and dq hold M queries of a head and stream the keys
of their sample by N; dk and dv hold M keys and stream a chunk of the queries.
Axes: B batch, N tokens, L rows of text, H heads, D head width; unit = (B, H).
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
    key_gradient,
    load_rows,
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

        Forward and dq as in `spatial_attention` without norms. Tiles of 64 keys: 300 text tokens
        are 4.7 of them, and 2.3 of 128; steps of 64 queries spill, steps of 32 do not. In float32
        dq of 32 rows spills on sm_80; of 64 it takes 80 registers.
        """
        if dtype == torch.float32:
            tile, tall = Tile(32, 32, warps=4, stages=1), Tile(64, 16, warps=8, stages=1)
            return cls(forward=tile, query_gradient=tall, key_gradient=tile)
        return cls(
            forward=Tile(128, 64, warps=8, stages=2),
            query_gradient=Tile(128 if width <= 80 else 64, 32, warps=8, stages=2),
            key_gradient=Tile(64, 32, warps=4 if width <= 80 else 8, stages=2),
        )

    def chunks(self, units: int, tokens: int, longest: int) -> int:
        """Split the queries of a sample for dk and dv.

        Until 4 programs come to each of 132 SMs, but into no less than 1024 queries: every chunk
        costs a float32 copy of dk and dv, written and read.
        """
        programs = units * triton.cdiv(longest, self.key_gradient.rows)
        return int(max(min(triton.cdiv(4 * 132, programs), tokens // 1024), 1))


@triton.jit(do_not_specialize=["TOKENS", "TILES"])
def forward_kernel(
    q_ptr,  # [B, TOKENS, H, D], dense D
    kv_ptr,  # [L, 2, H, D], dense D
    starts_ptr,  # [B] int32: the sample's first row of kv
    lengths_ptr,  # [B] int32: its number of keys
    o_ptr,  # [B, TOKENS, H, D] dense
    lse_ptr,  # [B*H, TOKENS] float32
    stride_qb,
    stride_qn,
    stride_kv,
    stride_v,
    TOKENS,
    TILES,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    Q_STRIDE_H: tl.constexpr,
    KV_STRIDE_H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0) // TILES
    batch, head = unit // H, unit % H
    rows = tl.program_id(0) % TILES * M + tl.arange(0, M)
    q_ptr += offset(batch, stride_qb, INT64) + offset(head, Q_STRIDE_H, INT64)
    q, q_tail = load_rows(q_ptr, rows, stride_qn, TOKENS, D, HEAD, TAIL, INT64)
    first = tl.load(starts_ptr + batch)
    keys = tl.load(lengths_ptr + batch)
    k_ptr = kv_ptr + offset(first, stride_kv, INT64) + offset(head, KV_STRIDE_H, INT64)
    v_ptr = k_ptr + stride_v
    o, o_tail, lse = attend(
        q, q_tail, k_ptr, v_ptr, lse_ptr, stride_kv, keys, scale, D, HEAD, TAIL, N, False, INT64
    )
    tl.store(lse_ptr + offset(unit, TOKENS, INT64) + rows, lse, mask=rows < TOKENS)
    o_ptr += offset(batch, TOKENS * H * D, INT64) + head * D
    store_tile(o_ptr + offset(rows, H * D, INT64), rows < TOKENS, o, o_tail, D, HEAD, TAIL)


@triton.jit(do_not_specialize=["TOKENS", "TILES"])
def query_gradient_kernel(
    do_ptr,  # [B, TOKENS, H, D] dense; o and dq likewise
    q_ptr,  # [B, TOKENS, H, D], dense D
    kv_ptr,  # [L, 2, H, D], dense D
    starts_ptr,  # [B] int32, like lengths
    lengths_ptr,
    o_ptr,
    lse_ptr,  # [B*H, TOKENS] float32
    dq_ptr,
    delta_ptr,  # [B*H, TOKENS] float32: sum of do * o, written
    stride_qb,
    stride_qn,
    stride_kv,
    stride_v,
    TOKENS,
    TILES,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    Q_STRIDE_H: tl.constexpr,
    KV_STRIDE_H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0) // TILES
    batch, head = unit // H, unit % H
    rows = tl.program_id(0) % TILES * M + tl.arange(0, M)
    place = offset(batch, TOKENS * H * D, INT64) + head * D
    o, o_tail = load_rows(o_ptr + place, rows, H * D, TOKENS, D, HEAD, TAIL, INT64)
    do, do_tail = load_rows(do_ptr + place, rows, H * D, TOKENS, D, HEAD, TAIL, INT64)
    delta = sum_tile(
        o.to(tl.float32) * do.to(tl.float32), o_tail.to(tl.float32) * do_tail.to(tl.float32), TAIL
    )
    stats = offset(unit, TOKENS, INT64) + rows
    tl.store(delta_ptr + stats, delta, mask=rows < TOKENS)
    lse = tl.load(lse_ptr + stats, mask=rows < TOKENS, other=0.0)
    q_ptr += offset(batch, stride_qb, INT64) + offset(head, Q_STRIDE_H, INT64)
    q, q_tail = load_rows(q_ptr, rows, stride_qn, TOKENS, D, HEAD, TAIL, INT64)
    first = tl.load(starts_ptr + batch)
    keys = tl.load(lengths_ptr + batch)
    k_ptr = kv_ptr + offset(first, stride_kv, INT64) + offset(head, KV_STRIDE_H, INT64)
    dq, dq_tail = query_gradient(
        q,
        q_tail,
        do,
        do_tail,
        lse,
        delta,
        k_ptr,
        k_ptr + stride_v,
        lse_ptr,
        stride_kv,
        keys,
        scale,
        D,
        HEAD,
        TAIL,
        N,
        False,
        INT64,
    )
    at = dq_ptr + place + offset(rows, H * D, INT64)
    store_tile(at, rows < TOKENS, dq, dq_tail, D, HEAD, TAIL)


@triton.jit(do_not_specialize=["TOKENS", "TILES", "CHUNK", "KEYS"])
def key_gradient_kernel(
    do_ptr,  # [B, TOKENS, H, D] dense
    q_ptr,  # [B, TOKENS, H, D], dense D
    kv_ptr,  # [L, 2, H, D], dense D
    starts_ptr,  # [B] int32, like lengths
    lengths_ptr,
    lse_ptr,  # [B*H, TOKENS] float32
    delta_ptr,  # [B*H, TOKENS] float32: sum of do * o
    partial_ptr,  # [chunks, KEYS = L, 2, H, D] float32: each chunk's dk and dv
    stride_qb,
    stride_qn,
    stride_kv,
    stride_v,
    TOKENS,
    TILES,
    CHUNK,  # queries, a multiple of N
    KEYS,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    Q_STRIDE_H: tl.constexpr,
    KV_STRIDE_H: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0) // TILES
    chunk = tl.program_id(1)
    batch, head = unit // H, unit % H
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, TOKENS)
    q_ptr += offset(batch, stride_qb, INT64) + offset(head, Q_STRIDE_H, INT64)
    do_ptr += offset(batch, TOKENS * H * D, INT64) + head * D
    lse_ptr += offset(unit, TOKENS, INT64)
    delta_ptr += offset(unit, TOKENS, INT64)
    first = tl.load(starts_ptr + batch)
    keys = tl.load(lengths_ptr + batch)
    k_ptr = kv_ptr + offset(first, stride_kv, INT64) + offset(head, KV_STRIDE_H, INT64)
    partial_ptr += offset(chunk * KEYS + first, 2 * H * D, INT64) + head * D
    # More keys than the caller promised take further turns: TILES only shapes the grid.
    for start in range(tl.program_id(0) % TILES * M, keys, TILES * M):
        rows = start + tl.arange(0, M)
        k, k_tail = load_rows(k_ptr, rows, stride_kv, keys, D, HEAD, TAIL, INT64)
        v, v_tail = load_rows(k_ptr + stride_v, rows, stride_kv, keys, D, HEAD, TAIL, INT64)
        dk, dk_tail, dv, dv_tail = key_gradient(
            k,
            k_tail,
            v,
            v_tail,
            q_ptr,
            do_ptr,
            lse_ptr,
            lse_ptr,
            delta_ptr,
            stride_qn,
            H * D,
            begin,
            end,
            scale,
            D,
            HEAD,
            TAIL,
            N,
            False,
            INT64,
        )
        at = partial_ptr + offset(rows, 2 * H * D, INT64)
        store_tile(at, rows < keys, dk, dk_tail, D, HEAD, TAIL)
        store_tile(at + H * D, rows < keys, dv, dv_tail, D, HEAD, TAIL)


def forward(q: Tensor, kv: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; returns y [B, N, H*D] and the log-sum-exp [B, H, N]."""
    batch, tokens, heads, width = q.shape
    o = q.new_empty(batch, tokens, heads * width)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if q.numel() == 0:
        return o, lse
    tile = Config.heuristic(width, q.dtype).forward
    strides, constants = _arguments(q, kv, tile)
    tiles = triton.cdiv(tokens, tile.rows)
    with torch.cuda.device_of(q):
        forward_kernel[(batch * heads * tiles,)](
            *(q, kv, starts, lengths, o, lse),
            *strides,
            tokens,
            tiles,
            LOG2E / width**0.5,
            **constants,
        )
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    kv: Tensor,
    starts: Tensor,
    lengths: Tensor,
    o: Tensor,
    lse: Tensor,
    longest: int,
    text: bool,
) -> tuple[Tensor, Tensor]:
    """Launch both backward kernels; returns dq and dkv, dense; dkv empty without `text`."""
    batch, tokens, heads, width = q.shape
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0 or kv.numel() == 0:
        dkv = torch.zeros_like(kv, memory_format=torch.contiguous_format)
        return dq.zero_(), dkv if text else kv.new_empty(0)
    delta = torch.empty_like(lse)
    config = Config.heuristic(width, q.dtype)
    with torch.cuda.device_of(q):
        strides, constants = _arguments(q, kv, config.query_gradient)
        tiles = triton.cdiv(tokens, config.query_gradient.rows)
        query_gradient_kernel[(batch * heads * tiles,)](
            *(do, q, kv, starts, lengths, o, lse, dq, delta),
            *strides,
            tokens,
            tiles,
            LOG2E / width**0.5,
            **constants,
        )
        if not text:
            return dq, kv.new_empty(0)
        tile = config.key_gradient
        chunks = config.chunks(batch * heads, tokens, longest)
        chunk = triton.cdiv(triton.cdiv(tokens, chunks), tile.streamed) * tile.streamed
        chunks, tiles = triton.cdiv(tokens, chunk), triton.cdiv(longest, tile.rows)
        strides, constants = _arguments(q, kv, tile, chunks)
        # Zeros: text that belongs to no sample gets no gradient.
        partial = kv.new_zeros(chunks, *kv.shape, dtype=torch.float32)
        key_gradient_kernel[(batch * heads * tiles, chunks)](
            *(do, q, kv, starts, lengths, lse, delta, partial),
            *strides,
            tokens,
            tiles,
            chunk,
            kv.shape[0],
            LOG2E / width**0.5,
            **constants,
        )
    return dq, partial.sum(0).to(kv.dtype)


def _arguments(
    q: Tensor, kv: Tensor, tile: Tile, copies: int = 1
) -> tuple[list[int], dict[str, int]]:
    """Return what every kernel takes: strides, constants and options; `copies` of kv are dense."""
    heads, width = q.shape[2:]
    if width > 1 and (q.stride(-1) != 1 or kv.stride(-1) != 1):
        raise ValueError(f"q and kv must be dense in D, got strides {q.stride()}, {kv.stride()}")
    if width > MAX_WIDTH:
        raise NotImplementedError(f"heads must be at most {MAX_WIDTH} wide, got {width}")
    head, tail = split_head(width)
    constants = {
        "H": heads,
        "D": width,
        "Q_STRIDE_H": q.stride(2),
        "KV_STRIDE_H": kv.stride(2),
        "HEAD": head,
        "TAIL": tail,
        "M": tile.rows,
        "N": tile.streamed,
        "INT64": needs_int64(q, kv) or max(q.numel(), copies * kv.numel()) > 2**31,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return [q.stride(0), q.stride(1), kv.stride(0), kv.stride(1)], constants
