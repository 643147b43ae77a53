"""Run `qk_norm_rope` on CUDA; contract in `opensora/ops/qk_norm_rope.py`.

Bytes: forward reads and writes qkv once, in place q and k alone; backward reads dy and, of x, q and
k, and writes dx. Tables and weights stay in cache. Tiling: a program holds the HEADS x D block of
one token that is contiguous in memory, of q, k or v (its `part`); backward walks a run of tokens
and keeps that run's gradient of the weight in registers, a row for each head.
Axes: N positions, H heads, D head width. Tokens follow one another in memory; RUN of them, one
after another, share a position, so that a rotation over the frames of [B, T, S] moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora.kernels._tl import (
    even_columns,
    load_row,
    load_tile,
    needs_int64,
    offset,
    rotate_pairs,
    rotate_tile,
    split_row,
    store_row,
    store_tile,
    sum_tile,
)


@dataclass(frozen=True)
class Config:
    """Hold the launch parameters of both kernels."""

    forward_heads: int  # of one program of one warp
    backward_heads: int
    tokens: int  # of one backward program

    @classmethod
    def heuristic(cls, heads: int, width: int) -> Config:
        """Choose by shape, from counts compiled for sm_80, 90 and 100 (Triton 3.7); not timed yet.

        At D = 72 the forward takes 16 heads as 64 + 8 columns: 72 registers and 640 instructions
        for 1152 elements, where 8 heads of 128 masked columns take 568 instructions for half as
        many. Backward holds four such tiles: 240 registers as 64 + 8 columns, 128 as 8 heads of
        128 columns. 32 tokens make 8946 programs of the 47.7k tokens of a 480p, 2 s request, for
        0.3 % more bytes.
        """
        rows = triton.next_power_of_2(heads)
        return cls(
            forward_heads=min(rows, max(1, 1024 // split_row(width)[0])),
            backward_heads=min(rows, max(1, 1024 // triton.next_power_of_2(width))),
            tokens=32,
        )


@triton.jit(do_not_specialize=["N", "RUN"])
def forward_kernel(
    x_ptr,  # [tokens, 3, H, D] dense
    y_ptr,  # like x, or x itself
    q_weight_ptr,  # [D] dense, read if NORM, like k_weight
    k_weight_ptr,
    cos_ptr,  # [N, D] dense, equal in pairs, read if ROTARY, like sin
    sin_ptr,
    N,
    RUN,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,  # 3, or 2 without v
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    LEGACY: tl.constexpr,
    INT64: tl.constexpr,
):
    part = tl.program_id(0) % PARTS
    block = tl.program_id(0) // PARTS
    token = block // tl.cdiv(H, HEADS)
    heads = block % tl.cdiv(H, HEADS) * HEADS + tl.arange(0, HEADS)
    at = offset(token, 3 * H * D, INT64) + part * H * D + heads * D
    x, x_tail = load_tile(x_ptr + at, heads < H, D, HEAD, TAIL)
    x, x_tail = x.to(tl.float32), x_tail.to(tl.float32)
    if part < 2:
        if ROTARY:
            position = token // RUN % N
            cos, cos_tail = load_row(cos_ptr + position * D, D, HEAD, TAIL)
            sin, sin_tail = load_row(sin_ptr + position * D, D, HEAD, TAIL)
            cos, cos_tail = even_columns(cos[None, :]), even_columns(cos_tail[None, :])
            sin, sin_tail = even_columns(sin[None, :]), even_columns(sin_tail[None, :])
            if LEGACY:
                x, x_tail = rotate_tile(x, x_tail, cos, cos_tail, sin, sin_tail, TAIL)
        if NORM:
            weight_ptr = q_weight_ptr
            if part == 1:
                weight_ptr = k_weight_ptr
            weight, weight_tail = load_row(weight_ptr, D, HEAD, TAIL)
            rstd = tl.rsqrt(sum_tile(x * x, x_tail * x_tail, TAIL) / D + eps)[:, None]
            x = (x * rstd).to(x_ptr.dtype.element_ty).to(tl.float32) * weight
            x_tail = (x_tail * rstd).to(x_ptr.dtype.element_ty).to(tl.float32) * weight_tail
        if ROTARY and not LEGACY:
            x, x_tail = rotate_tile(x, x_tail, cos, cos_tail, sin, sin_tail, TAIL)
    store_tile(y_ptr + at, heads < H, x, x_tail, D, HEAD, TAIL)


@triton.jit(do_not_specialize=["TOKENS", "N", "RUN"])
def backward_kernel(
    dy_ptr,  # [TOKENS, 3, H, D] dense
    x_ptr,  # [TOKENS, 3, H, D] dense
    q_weight_ptr,  # [D] dense, read if NORM, like k_weight
    k_weight_ptr,
    cos_ptr,  # [N, D] dense, equal in pairs, read if ROTARY, like sin
    sin_ptr,
    dx_ptr,  # [TOKENS, 3, H, D] dense
    partial_ptr,  # [2, programs / 3, D] float32, written if NORM: dweight of each program
    TOKENS,
    N,
    RUN,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two
    HEADS: tl.constexpr,
    WALK: tl.constexpr,  # tokens of a program
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    LEGACY: tl.constexpr,
    INT64: tl.constexpr,
):
    part = tl.program_id(0) % 3
    block = tl.program_id(0) // 3
    first = block // tl.cdiv(H, HEADS) * WALK
    count = tl.minimum(WALK, TOKENS - first)
    heads = block % tl.cdiv(H, HEADS) * HEADS + tl.arange(0, HEADS)
    seen = heads < H
    if part == 2:
        for i in range(count):
            at = offset(first + i, 3 * H * D, INT64) + part * H * D + heads * D
            g = load_tile(dy_ptr + at, seen, D, WIDTH, 0)[0]
            store_tile(dx_ptr + at, seen, g, g, D, WIDTH, 0)
    else:
        dweight = tl.zeros((HEADS, WIDTH), tl.float32)
        if NORM:
            weight_ptr = q_weight_ptr
            if part == 1:
                weight_ptr = k_weight_ptr
            weight = load_row(weight_ptr, D, WIDTH, 0)[0]
        for i in range(count):
            at = offset(first + i, 3 * H * D, INT64) + part * H * D + heads * D
            g = load_tile(dy_ptr + at, seen, D, WIDTH, 0)[0]
            g = g.to(tl.float32)
            if ROTARY:
                position = (first + i) // RUN % N
                cos = even_columns(load_row(cos_ptr + position * D, D, WIDTH, 0)[0][None, :])
                sin = even_columns(load_row(sin_ptr + position * D, D, WIDTH, 0)[0][None, :])
                if not LEGACY:
                    g = rotate_pairs(g, cos, -sin)
            if NORM:
                x = load_tile(x_ptr + at, seen, D, WIDTH, 0)[0]
                x = x.to(tl.float32)
                if ROTARY and LEGACY:
                    x = rotate_pairs(x, cos, sin)
                rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
                n = x * rstd
                dweight += g * n
                g *= weight
                g = rstd * (g - n * (tl.sum(g * n, axis=1) / D)[:, None])
            if ROTARY and LEGACY:
                g = rotate_pairs(g, cos, -sin)
            store_tile(dx_ptr + at, seen, g, g, D, WIDTH, 0)
        if NORM:
            row = part * (tl.num_programs(0) // 3) + block
            total = tl.sum(dweight, axis=0)
            store_row(partial_ptr + offset(row, D, INT64), total, total, D, WIDTH, 0)


def forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_dim: int,
    legacy: bool,
    eps: float,
) -> Tensor:
    """Launch the forward kernel; everything is dense."""
    y = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _forward(qkv, y, q_weight, k_weight, cos, sin, position_dim, legacy, eps)
    return y


def inplace(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_dim: int,
    legacy: bool,
    eps: float,
) -> None:
    """Launch the forward kernel on q and k of a dense qkv and overwrite them."""
    _forward(qkv, qkv, q_weight, k_weight, cos, sin, position_dim, legacy, eps)


def _forward(
    qkv: Tensor,
    y: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_dim: int,
    legacy: bool,
    eps: float,
) -> None:
    if qkv.numel() == 0:
        return
    heads, width = qkv.shape[-2:]
    config = Config.heuristic(heads, width)
    head, tail = split_row(width)
    parts = 2 if y is qkv else 3
    tokens = qkv.shape[:-3].numel()
    with torch.cuda.device_of(qkv):
        forward_kernel[(tokens * triton.cdiv(heads, config.forward_heads) * parts,)](
            qkv,
            y,
            qkv if q_weight is None else q_weight,
            qkv if k_weight is None else k_weight,
            qkv if cos is None else cos,
            qkv if sin is None else sin,
            qkv.shape[position_dim],
            qkv.shape[position_dim + 1 : -3].numel(),
            eps,
            H=heads,
            D=width,
            HEAD=head,
            TAIL=tail,
            HEADS=config.forward_heads,
            PARTS=parts,
            NORM=q_weight is not None,
            ROTARY=cos is not None,
            LEGACY=legacy,
            INT64=needs_int64(qkv),
            num_warps=1,
        )


def backward(
    dy: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_dim: int,
    legacy: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; returns dqkv and dweights [2, D], or [2, 0] without weights."""
    heads, width = qkv.shape[-2:]
    columns = 0 if q_weight is None else width
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if qkv.numel() == 0:
        return dqkv, qkv.new_zeros(2, columns, dtype=torch.float32)
    config = Config.heuristic(heads, width)
    tokens = qkv.shape[:-3].numel()
    blocks = triton.cdiv(tokens, config.tokens) * triton.cdiv(heads, config.backward_heads)
    partial = qkv.new_empty(2, blocks, columns, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        backward_kernel[(blocks * 3,)](
            dy,
            qkv,
            qkv if q_weight is None else q_weight,
            qkv if k_weight is None else k_weight,
            qkv if cos is None else cos,
            qkv if sin is None else sin,
            dqkv,
            partial,
            tokens,
            qkv.shape[position_dim],
            qkv.shape[position_dim + 1 : -3].numel(),
            eps,
            H=heads,
            D=width,
            WIDTH=triton.next_power_of_2(width),
            HEADS=config.backward_heads,
            WALK=config.tokens,
            NORM=q_weight is not None,
            ROTARY=cos is not None,
            LEGACY=legacy,
            INT64=needs_int64(qkv),
            num_warps=1,
        )
    return dqkv, partial.sum(1)
