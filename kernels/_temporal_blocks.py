"""Differentiate temporal attention over blocks of frames, for more frames than a tile holds.

Programs and addresses are those of `temporal_attention.py`, whose launchers use these kernels on
queries and keys that are normalised and rotated already. One kernel streams keys past a block of
queries, twice, and leaves the log-sum-exp and delta of each row to the other, which streams queries
past a block of keys.
Axes: B batch, T frames, S patches per frame, H heads, D head width, M rows of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opensora.kernels._flash import attend, key_gradient, query_gradient
from opensora.kernels._tl import load_tile, offset, store_tile, sum_tile


@triton.jit
def place(unit, S, H: tl.constexpr, M: tl.constexpr, FRAMES: tl.constexpr):
    """Return a unit's batch and head, and the patch of each row of its tile."""
    tiles = tl.cdiv(S, M // FRAMES)
    patches = unit // H % tiles * (M // FRAMES) + tl.arange(0, M) // FRAMES
    return unit // H // tiles, unit % H, patches


@triton.jit
def mask_scores(x, first, T, M: tl.constexpr, FRAMES: tl.constexpr):
    """Give -inf to keys past frame T and, where patches share a tile, to those of other patches."""
    rows = tl.arange(0, M)
    seen = (first + rows % FRAMES < T)[None, :]
    if FRAMES < M:
        seen = seen & ((rows // FRAMES)[:, None] == (rows // FRAMES)[None, :])
    return tl.where(seen, x, float("-inf"))


@triton.jit(do_not_specialize=["T", "S"])
def query_gradient_kernel(
    dy_ptr,  # [B, T, S, H, D] dense
    qkv_ptr,  # [B, T, S, 3, H, D], the last three dense
    dqkv_ptr,  # [B, T, S, 3, H, D] dense
    lse_ptr,  # [B*S*H, T] float32: log2 of the sum of powers of two
    delta_ptr,  # [B*S*H, T] float32: sum of do * o
    T,
    S,
    batch_stride,
    frame_stride,
    patch_stride,
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,  # rows of a step
    INT64: tl.constexpr,
):
    """Differentiate a block of queries, in two sweeps over the keys: attention again, then dq."""
    unit = tl.program_id(0) // tl.cdiv(T, M)
    batch, s, head = unit // H // S, unit // H % S, unit % H
    t = tl.program_id(0) % tl.cdiv(T, M) * M + tl.arange(0, M)
    seen = t < T
    base = qkv_ptr + offset(batch, batch_stride, INT64) + offset(s, patch_stride, INT64) + head * D
    q, q_tail = load_tile(base + offset(t, frame_stride, INT64), seen, D, HEAD, TAIL)
    token = (batch * T + t) * S + s
    do, do_tail = load_tile(dy_ptr + offset(token, H * D, INT64) + head * D, seen, D, HEAD, TAIL)
    k_ptr = base + H * D
    o, o_tail, lse = attend(
        q, q_tail, k_ptr, k_ptr + H * D, k_ptr, frame_stride, T, scale,
        D, HEAD, TAIL, N, False, INT64,
    )  # fmt: skip
    delta = sum_tile(do * o, do_tail * o_tail, TAIL)
    g, g_tail = query_gradient(
        q, q_tail, do, do_tail, lse, delta, k_ptr, k_ptr + H * D, k_ptr, frame_stride, T, scale,
        D, HEAD, TAIL, N, False, INT64,
    )  # fmt: skip
    tl.store(lse_ptr + offset(unit, T, INT64) + t, lse, mask=seen)
    tl.store(delta_ptr + offset(unit, T, INT64) + t, delta, mask=seen)
    dq_rows = dqkv_ptr + offset(token, 3 * H * D, INT64) + head * D
    store_tile(dq_rows, seen, g, g_tail, D, HEAD, TAIL)


@triton.jit(do_not_specialize=["T", "S"])
def key_gradient_kernel(
    dy_ptr,  # all as in query_gradient_kernel
    qkv_ptr,
    dqkv_ptr,
    lse_ptr,
    delta_ptr,
    T,
    S,
    batch_stride,
    frame_stride,
    patch_stride,
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,  # rows of a step
    INT64: tl.constexpr,
):
    """Differentiate a block of keys and values, streaming queries."""
    unit = tl.program_id(0) // tl.cdiv(T, M)
    batch, s, head = unit // H // S, unit // H % S, unit % H
    t = tl.program_id(0) % tl.cdiv(T, M) * M + tl.arange(0, M)
    seen = t < T
    base = qkv_ptr + offset(batch, batch_stride, INT64) + offset(s, patch_stride, INT64) + head * D
    k_ptr = base + offset(t, frame_stride, INT64) + H * D
    k, k_tail = load_tile(k_ptr, seen, D, HEAD, TAIL)
    v, v_tail = load_tile(k_ptr + H * D, seen, D, HEAD, TAIL)
    rows = offset(unit, T, INT64)
    g, g_tail, dv, dv_tail = key_gradient(
        k, k_tail, v, v_tail,
        base, dy_ptr + offset(batch * T * S + s, H * D, INT64) + head * D, base,
        lse_ptr + rows, delta_ptr + rows, frame_stride, S * H * D, 0, T, scale,
        D, HEAD, TAIL, N, False, INT64,
    )  # fmt: skip
    token = (batch * T + t) * S + s
    dk_rows = dqkv_ptr + offset(token, 3 * H * D, INT64) + (H + head) * D
    store_tile(dk_rows, seen, g, g_tail, D, HEAD, TAIL)
    store_tile(dk_rows + H * D, seen, dv, dv_tail, D, HEAD, TAIL)
