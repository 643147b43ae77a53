"""Run `temporal_attention` on CUDA; contract in `opensora/ops/temporal_attention.py`.

Bytes: up to 64 frames, forward reads q, k and v and writes y, backward reads dy as well and writes
dqkv, each once but for what comes from the cache again; nothing else is saved. Tiling: a tile of M
rows holds the frames of one patch and head, padded to FRAMES, a power of two; up to 8 frames,
several patches share a tile, and a row sees the keys of its own patch. More than 64 frames
are walked in blocks of 64: the forward and the gradient of q stream keys past queries, the
gradients of k and v stream queries past keys; that backward leaves norm and rotation to the kernels
of `qk_norm_rope`, for the registers they take.
Axes: B batch, T frames, S patches per frame, H heads, D head width. A unit is one tile, or one
patch if it has several tiles, of one head; heads are the innermost axis of units, so that the next
programs read the memory beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora.kernels import qk_norm_rope
from opensora.kernels._flash import LN2, LOG2E, accumulate, outer, split_head, zeros
from opensora.kernels._heads import inverse_rms, load_prepared, prepare, prepare_backward
from opensora.kernels._temporal_blocks import (
    key_gradient_kernel,
    mask_scores,
    place,
    query_gradient_kernel,
)
from opensora.kernels._tl import load_tile, needs_int64, offset, store_row, store_tile

MOST_FRAMES = 64  # of one tile


@dataclass(frozen=True)
class Config:
    """Hold the launch parameters of all kernels."""

    rows: int  # M of a tile
    frames: int  # of a tile's rows, that belong to one patch
    blocks: int  # of rows in T
    forward_warps: int
    backward_warps: int
    step: int  # rows that a backward program streams at a time past a block

    @classmethod
    def heuristic(cls, frames: int, width: int, itemsize: int) -> Config:
        """Choose by shape, from counts compiled for sm_80, 90 and 100 (Triton 3.7); not timed yet.

        A forward warp takes 16 rows, the least of a matrix instruction. So does a backward warp at
        D = 72 in bfloat16: 192 registers on sm_90; in a loop over tiles, which would make the
        partial sums 2 % of the bytes and not 8, it took 255. Wider rows spilled 22 times in one
        warp and take two, float32 takes four, and a tile of 64 rows, which spilled 24 times in
        four, takes eight. Past a block of 64, steps of 64 rows spilled 76 times, steps of 32 do
        not.
        """
        padded = min(triton.next_power_of_2(frames), MOST_FRAMES)
        rows = max(padded, 16)
        blocks = triton.cdiv(frames, padded)
        warps = rows // 16 * triton.next_power_of_2(triton.cdiv(width, 72))
        if itemsize > 2:
            warps *= 4
        return cls(
            rows=rows,
            frames=padded,
            blocks=blocks,
            forward_warps=rows // 16,
            backward_warps=8 if rows == 64 and blocks == 1 else min(warps, 8),
            step=32,
        )


@triton.jit(do_not_specialize=["T", "S"])
def forward_kernel(
    qkv_ptr,  # [B, T, S, 3, H, D], the last three dense
    q_weight_ptr,  # [D] dense, read if NORM, like k_weight
    k_weight_ptr,
    cos_ptr,  # [T, D] dense, equal in pairs, read if ROTARY, like sin
    sin_ptr,
    y_ptr,  # [B, T, S, H, D] dense
    T,
    S,
    batch_stride,
    frame_stride,
    patch_stride,
    scale,  # log2(e) / sqrt(D)
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    FRAMES: tl.constexpr,
    ONE: tl.constexpr,  # one tile holds all frames
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    INT64: tl.constexpr,
):
    blocks = 1 if ONE else tl.cdiv(T, M)
    batch, head, s = place(tl.program_id(0) // blocks, S, H, M, FRAMES)
    first = tl.program_id(0) % blocks * M
    base = qkv_ptr + offset(batch, batch_stride, INT64) + offset(s, patch_stride, INT64) + head * D
    t = first + tl.arange(0, M) % FRAMES
    seen = (t < T) & (s < S)
    q_ptr = base + offset(t, frame_stride, INT64)
    q, q_tail = load_prepared(
        q_ptr, q_weight_ptr, cos_ptr, sin_ptr, t, seen, eps, D, HEAD, TAIL, NORM, ROTARY
    )
    o, o_tail = zeros(M, HEAD, TAIL)
    if ONE:
        k_ptr = q_ptr + H * D
        k, k_tail = load_prepared(
            k_ptr, k_weight_ptr, cos_ptr, sin_ptr, t, seen, eps, D, HEAD, TAIL, NORM, ROTARY
        )
        v, v_tail = load_tile(k_ptr + H * D, seen, D, HEAD, TAIL)
        x = mask_scores(outer(q, q_tail, k, k_tail, TAIL) * scale, 0, T, M, FRAMES)
        p = tl.exp2(x - tl.max(x, axis=1)[:, None])
        p /= tl.sum(p, axis=1)[:, None]
        o, o_tail = accumulate(p, v, v_tail, o, o_tail, TAIL)
    else:
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        for start in range(0, T, M):
            u = start + tl.arange(0, M)
            k_ptr = base + offset(u, frame_stride, INT64) + H * D
            k, k_tail = load_prepared(
                k_ptr, k_weight_ptr, cos_ptr, sin_ptr, u, u < T, eps, D, HEAD, TAIL, NORM, ROTARY
            )
            v, v_tail = load_tile(k_ptr + H * D, u < T, D, HEAD, TAIL)
            x = outer(q, q_tail, k, k_tail, TAIL) * scale
            x = mask_scores(x, start, T, M, FRAMES)
            higher = tl.maximum(top, tl.max(x, axis=1))
            p = tl.exp2(x - higher[:, None])
            decay = tl.exp2(top - higher)
            total = total * decay + tl.sum(p, axis=1)
            o *= decay[:, None]
            if TAIL > 0:
                o_tail *= decay[:, None]
            o, o_tail = accumulate(p, v, v_tail, o, o_tail, TAIL)
            top = higher
        o /= total[:, None]
        if TAIL > 0:
            o_tail /= total[:, None]
    y_rows = y_ptr + offset((batch * T + t) * S + s, H * D, INT64) + head * D
    store_tile(y_rows, seen, o, o_tail, D, HEAD, TAIL)


@triton.jit(do_not_specialize=["T", "S"])
def backward_kernel(
    dy_ptr,  # [B, T, S, H, D] dense
    qkv_ptr,  # [B, T, S, 3, H, D], the last three dense
    q_weight_ptr,  # [D] dense, read if NORM, like k_weight
    k_weight_ptr,
    cos_ptr,  # [T, D] dense, equal in pairs, read if ROTARY, like sin
    sin_ptr,
    dqkv_ptr,  # [B, T, S, 3, H, D] dense
    partial_ptr,  # [2, units, D] float32, written if NORM: dweight of each program
    T,
    S,
    batch_stride,
    frame_stride,
    patch_stride,
    scale,  # log2(e) / sqrt(D)
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    FRAMES: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    INT64: tl.constexpr,
):
    """Differentiate tiles that hold all frames."""
    batch, head, s = place(tl.program_id(0), S, H, M, FRAMES)
    t = tl.arange(0, M) % FRAMES
    seen = (t < T) & (s < S)
    base = qkv_ptr + offset(batch, batch_stride, INT64) + head * D
    q_ptr = base + offset(t, frame_stride, INT64) + offset(s, patch_stride, INT64)
    k_ptr = q_ptr + H * D
    token = (batch * T + t) * S + s
    do_ptr = dy_ptr + offset(token, H * D, INT64) + head * D
    dq_ptr = dqkv_ptr + offset(token, 3 * H * D, INT64) + head * D
    q, q_tail = load_tile(q_ptr, seen, D, HEAD, TAIL)
    q_rstd = inverse_rms(q, q_tail, eps, D, TAIL)
    q, q_tail = prepare(
        q, q_tail, q_rstd, q_weight_ptr, cos_ptr, sin_ptr, t, seen,
        D, HEAD, TAIL, NORM, ROTARY,
    )  # fmt: skip
    k, k_tail = load_tile(k_ptr, seen, D, HEAD, TAIL)
    k_rstd = inverse_rms(k, k_tail, eps, D, TAIL)
    k, k_tail = prepare(
        k, k_tail, k_rstd, k_weight_ptr, cos_ptr, sin_ptr, t, seen,
        D, HEAD, TAIL, NORM, ROTARY,
    )  # fmt: skip
    x = outer(q, q_tail, k, k_tail, TAIL)
    # k waits where dq goes and q where dk goes: computing both again takes 900 instructions.
    # Barriers part the loads of one thread from the stores of another.
    store_tile(dq_ptr, seen, k, k_tail, D, HEAD, TAIL)
    store_tile(dq_ptr + H * D, seen, q, q_tail, D, HEAD, TAIL)
    p = mask_scores(x * scale, 0, T, M, FRAMES)
    p = tl.exp2(p - tl.max(p, axis=1)[:, None])
    p /= tl.sum(p, axis=1)[:, None]
    do, do_tail = load_tile(do_ptr, seen, D, HEAD, TAIL)
    g, g_tail = zeros(M, HEAD, TAIL)
    g, g_tail = accumulate(tl.trans(p), do, do_tail, g, g_tail, TAIL)
    store_tile(dq_ptr + 2 * H * D, seen, g, g_tail, D, HEAD, TAIL)
    # After a store a load is a load: rows come from the cache again rather than wait in
    # registers, which spilled.
    do, do_tail = load_tile(do_ptr, seen, D, HEAD, TAIL)
    v, v_tail = load_tile(k_ptr + H * D, seen, D, HEAD, TAIL)
    dp = outer(do, do_tail, v, v_tail, TAIL)
    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * (scale * LN2)
    q_mean, k_mean = tl.sum(ds * x, axis=1) / D, tl.sum(ds * x, axis=0) / D
    ds = ds.to(qkv_ptr.dtype.element_ty)
    tl.debug_barrier()
    k, k_tail = load_tile(dq_ptr, seen, D, HEAD, TAIL)
    g, g_tail = zeros(M, HEAD, TAIL)
    g, g_tail = accumulate(ds, k, k_tail, g, g_tail, TAIL)
    g, g_tail, dweight, dweight_tail = prepare_backward(
        g, g_tail, q_ptr, q_rstd, q_mean, q_weight_ptr, cos_ptr, sin_ptr, t, seen,
        D, HEAD, TAIL, NORM, ROTARY,
    )  # fmt: skip
    tl.debug_barrier()
    store_tile(dq_ptr, seen, g, g_tail, D, HEAD, TAIL)
    row_ptr = partial_ptr + offset(tl.program_id(0), D, INT64)
    if NORM:
        store_row(row_ptr, dweight, dweight_tail, D, HEAD, TAIL)
    q, q_tail = load_tile(dq_ptr + H * D, seen, D, HEAD, TAIL)
    g, g_tail = zeros(M, HEAD, TAIL)
    g, g_tail = accumulate(tl.trans(ds), q, q_tail, g, g_tail, TAIL)
    g, g_tail, dweight, dweight_tail = prepare_backward(
        g, g_tail, k_ptr, k_rstd, k_mean, k_weight_ptr, cos_ptr, sin_ptr, t, seen,
        D, HEAD, TAIL, NORM, ROTARY,
    )  # fmt: skip
    tl.debug_barrier()
    store_tile(dq_ptr + H * D, seen, g, g_tail, D, HEAD, TAIL)
    if NORM:
        row_ptr += offset(tl.num_programs(0), D, INT64)
        store_row(row_ptr, dweight, dweight_tail, D, HEAD, TAIL)


def forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> Tensor:
    """Launch the forward kernel; the last three dimensions of qkv and all else are dense."""
    batch, frames, patches, _, heads, width = qkv.shape
    y = qkv.new_empty(batch, frames, patches, heads * width)
    if qkv.numel() == 0:
        return y
    config = Config.heuristic(frames, width, qkv.element_size())
    units = batch * triton.cdiv(patches, config.rows // config.frames) * heads
    with torch.cuda.device_of(qkv):
        forward_kernel[(units * config.blocks,)](
            *_inputs(qkv, q_weight, k_weight, cos, sin),
            y,
            frames,
            patches,
            *qkv.stride()[:3],
            LOG2E * width**-0.5,
            eps,
            FRAMES=config.frames,
            ONE=config.blocks == 1,
            NORM=q_weight is not None,
            ROTARY=cos is not None,
            num_warps=config.forward_warps,
            **_constants(config, qkv),
        )
    return y


def backward(
    dy: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels; returns dqkv and dweights [2, D], or [2, 0] without weights."""
    batch, frames, patches, _, heads, width = qkv.shape
    prepared = q_weight is None and cos is None
    if frames > MOST_FRAMES and not prepared and qkv.numel() > 0:
        rules = (q_weight, k_weight, cos, sin, -5, False, eps)
        qkv = qkv.contiguous()
        dqkv, _ = backward(dy, qk_norm_rope.forward(qkv, *rules), None, None, None, None, eps)
        return qk_norm_rope.backward(dqkv, qkv, *rules)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    columns = 0 if q_weight is None else width
    if qkv.numel() == 0:
        return dqkv, qkv.new_zeros(2, columns, dtype=torch.float32)
    config = Config.heuristic(frames, width, qkv.element_size())
    units = batch * triton.cdiv(patches, config.rows // config.frames) * heads
    numbers = (frames, patches, *qkv.stride()[:3], LOG2E * width**-0.5)
    constants = _constants(config, qkv) | {"num_warps": config.backward_warps}
    with torch.cuda.device_of(qkv):
        if config.blocks > 1:
            lse, delta = qkv.new_empty(2, units, frames, dtype=torch.float32)
            for kernel in (query_gradient_kernel, key_gradient_kernel):
                kernel[(units * config.blocks,)](
                    dy, qkv, dqkv, lse, delta, *numbers, N=config.step, **constants
                )
            return dqkv, qkv.new_zeros(2, 0, dtype=torch.float32)
        partial = qkv.new_empty(2, units, columns, dtype=torch.float32)
        backward_kernel[(units,)](
            dy,
            *_inputs(qkv, q_weight, k_weight, cos, sin),
            dqkv,
            partial,
            *numbers,
            eps,
            FRAMES=config.frames,
            NORM=q_weight is not None,
            ROTARY=cos is not None,
            **constants,
        )
    return dqkv, partial.sum(1)


def _inputs(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the kernels' inputs, with qkv in place of what is not read."""
    return (qkv, *(qkv if t is None else t for t in (q_weight, k_weight, cos, sin)))


def _constants(config: Config, qkv: Tensor) -> dict[str, Any]:
    """Return the constants and options that all kernels share."""
    heads, width = qkv.shape[-2:]
    head, tail = split_head(width)
    return {
        "H": heads,
        "D": width,
        "HEAD": head,
        "TAIL": tail,
        "M": config.rows,
        "INT64": needs_int64(qkv) or qkv.numel() >= 2**31,
        "num_stages": 1,
    }
