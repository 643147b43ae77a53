"""Run `patchify` on CUDA; contract in `opensora/ops/patchify.py`.

Bytes: forward reads x once and writes the tokens; backward reads their gradient once and, from the
second level cache, x once for every block of channels; weight, bias and positions stay in cache.
Tiling: forward keeps the patches of M rows as the operand of its products and walks the channels;
backward keeps a block of channels and walks a run of rows, and sums the runs afterwards.
Axes: rows are B*T'*S tokens; I, T, H, W and C as in the contract, K = I*PT*PH*PW.
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
    """Hold the launch parameters of all kernels."""

    rows: int  # M, of a tile
    channels: int  # N, of a tile
    run: int  # rows of one backward program, a multiple of M
    warps: int

    @classmethod
    def heuristic(cls, dtype: torch.dtype) -> Config:
        """Choose one tile for every model; counted for sm_80, 90 and 100, not timed yet.

        64 and 128 channels divide 1152 evenly. Exact products of float32 run without tensor cores
        and spill at 64 x 128. Runs of 512 rows make 846 backward programs of the 47.7k tokens of a
        480p, 2 s request, six for each of 132 SMs, and 7 MB of partial sums.
        """
        if dtype == torch.float32:
            return cls(rows=32, channels=64, run=512, warps=4)
        return cls(rows=64, channels=128, run=512, warps=4)


@triton.jit
def patch_offsets(
    row,  # [M]
    ROWS,  # B*T'*S
    T,
    H,
    W,
    B_stride,  # strides of x
    I_stride,
    T_stride,
    H_stride,
    W_stride,
    K: tl.constexpr,
    K_LANES: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    INT64: tl.constexpr,
):
    """Return where in x the patches of rows lie [M, K_LANES], and which lanes are pixels of x."""
    frames, lines, columns = tl.cdiv(T, PT), tl.cdiv(H, PH), tl.cdiv(W, PW)
    k = tl.arange(0, K_LANES)
    w = (row % columns * PW)[:, None] + (k % PW)[None, :]
    h = (row // columns % lines * PH)[:, None] + (k // PW % PH)[None, :]
    t = (row // (lines * columns) % frames * PT)[:, None] + (k // (PW * PH) % PT)[None, :]
    at = offset(row // (lines * columns * frames), B_stride, INT64)[:, None]
    at += offset(k // (PW * PH * PT), I_stride, INT64)[None, :]
    at += offset(t, T_stride, INT64) + offset(h, H_stride, INT64) + offset(w, W_stride, INT64)
    pixels = (row < ROWS)[:, None] & (k < K)[None, :] & (t < T) & (h < H) & (w < W)
    return at, pixels


@triton.jit(do_not_specialize=["ROWS", "S", "T", "H", "W"])
def forward_kernel(
    x_ptr,  # [B, I, T, H, W], strides below
    weight_ptr,  # [C, K] dense
    bias_ptr,  # [C]
    positions_ptr,  # [S, C] dense
    tokens_ptr,  # [ROWS, C] dense
    ROWS,
    S,
    T,
    H,
    W,
    B_stride,
    I_stride,
    T_stride,
    H_stride,
    W_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    K_LANES: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    INT64: tl.constexpr,
):
    row = tl.program_id(0) * M + tl.arange(0, M)
    at, pixels = patch_offsets(
        row, ROWS, T, H, W, B_stride, I_stride, T_stride, H_stride, W_stride,
        K, K_LANES, PT, PH, PW, INT64,
    )  # fmt: skip
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    patches = tl.load(x_ptr + at, mask=pixels, other=0.0).to(dtype)
    k = tl.arange(0, K_LANES)
    place = row % S
    for first in range(0, C, N):
        n = first + tl.arange(0, N)
        weight = tl.load(
            weight_ptr + n[None, :] * K + k[:, None],
            mask=(n < C)[None, :] & (k < K)[:, None],
            other=0.0,
        )
        inside = (row < ROWS)[:, None] & (n < C)[None, :]
        code = tl.load(
            positions_ptr + offset(place, C, INT64)[:, None] + n[None, :], mask=inside, other=0.0
        )
        bias = tl.load(bias_ptr + n, mask=n < C, other=0.0).to(tl.float32)
        tokens = tl.dot(patches, weight, input_precision="ieee")
        tokens = tokens + bias[None, :] + code.to(tl.float32)
        here = offset(row, C, INT64)[:, None] + n[None, :]
        tl.store(tokens_ptr + here, tokens.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["ROWS", "T", "H", "W"])
def backward_kernel(
    dy_ptr,  # [ROWS, C] dense
    x_ptr,  # [B, I, T, H, W], strides below
    partial_ptr,  # [RUNS, K + 1, C] float32: each run's dweight, transposed, and its dbias
    ROWS,
    T,
    H,
    W,
    B_stride,
    I_stride,
    T_stride,
    H_stride,
    W_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    K_LANES: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    RUN: tl.constexpr,
    INT64: tl.constexpr,
):
    n = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, K_LANES)
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    dweight = tl.zeros((K_LANES, N), tl.float32)
    dbias = tl.zeros((N,), tl.float32)
    first = tl.program_id(0) * RUN
    for tile in range(first, tl.minimum(first + RUN, ROWS), M):
        row = tile + tl.arange(0, M)
        at, pixels = patch_offsets(
            row, ROWS, T, H, W, B_stride, I_stride, T_stride, H_stride, W_stride,
            K, K_LANES, PT, PH, PW, INT64,
        )  # fmt: skip
        patches = tl.load(x_ptr + at, mask=pixels, other=0.0).to(dtype)
        inside = (row < ROWS)[:, None] & (n < C)[None, :]
        dy = tl.load(dy_ptr + offset(row, C, INT64)[:, None] + n[None, :], mask=inside, other=0.0)
        dweight = tl.dot(tl.trans(patches), dy, dweight, input_precision="ieee")
        dbias += tl.sum(dy.to(tl.float32), axis=0)
    partial_ptr += offset(tl.program_id(0), (K + 1) * C, INT64)
    to = partial_ptr + k[:, None] * C + n[None, :]
    tl.store(to, dweight, mask=(k < K)[:, None] & (n < C)[None, :])
    tl.store(partial_ptr + K * C + n, dbias, mask=n < C)


@triton.jit(do_not_specialize=["ROWS", "T", "H", "W"])
def input_backward_kernel(
    dy_ptr,  # [ROWS, C] dense
    weight_ptr,  # [C, K] dense
    dx_ptr,  # [B, I, T, H, W] dense
    ROWS,
    T,
    H,
    W,
    B_stride,  # strides of dx
    I_stride,
    T_stride,
    H_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    K_LANES: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    INT64: tl.constexpr,
):
    row = tl.program_id(0) * M + tl.arange(0, M)
    k = tl.arange(0, K_LANES)
    dpatches = tl.zeros((M, K_LANES), tl.float32)
    for first in range(0, C, N):
        n = first + tl.arange(0, N)
        inside = (row < ROWS)[:, None] & (n < C)[None, :]
        dy = tl.load(dy_ptr + offset(row, C, INT64)[:, None] + n[None, :], mask=inside, other=0.0)
        weight = tl.load(
            weight_ptr + n[:, None] * K + k[None, :],
            mask=(n < C)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        dpatches = tl.dot(dy, weight, dpatches, input_precision="ieee")
    at, pixels = patch_offsets(
        row, ROWS, T, H, W, B_stride, I_stride, T_stride, H_stride, 1,
        K, K_LANES, PT, PH, PW, INT64,
    )  # fmt: skip
    tl.store(dx_ptr + at, dpatches.to(dx_ptr.dtype.element_ty), mask=pixels)


def forward(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Launch the forward kernel; all but x are dense and of one dtype."""
    config, count = Config.heuristic(weight.dtype), _tokens(x, weight)
    rows, places = x.shape[0] * count, positions.shape[0]
    tokens = weight.new_empty(x.shape[0], count, weight.shape[0])
    if tokens.numel() == 0:
        return tokens
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(rows, config.rows),)](
            x,
            weight,
            bias,
            positions,
            tokens,
            rows,
            places,
            *x.shape[2:],
            *x.stride(),
            **_constants(weight, config),
            INT64=needs_int64(x, tokens),
            num_warps=config.warps,
        )
    return tokens


def backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; returns dweight and dbias."""
    config, rows = Config.heuristic(weight.dtype), x.shape[0] * _tokens(x, weight)
    channels, depth = weight.shape[0], weight[0].numel()
    runs = triton.cdiv(rows, config.run)
    partial = weight.new_empty(runs, depth + 1, channels, dtype=torch.float32)
    if rows > 0:
        with torch.cuda.device_of(x):
            backward_kernel[(runs, triton.cdiv(channels, config.channels))](
                dy,
                x,
                partial,
                rows,
                *x.shape[2:],
                *x.stride(),
                **_constants(weight, config),
                RUN=config.run,
                INT64=needs_int64(x, dy, partial),
                num_warps=config.warps,
            )
    sums = partial.sum(0).to(weight.dtype)
    return sums[:-1].T.reshape(weight.shape).contiguous(), sums[-1].clone()


def input_backward(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Launch the backward kernel of the latent; returns dx, dense and of x's dtype."""
    config, rows = Config.heuristic(weight.dtype), x.shape[0] * _tokens(x, weight)
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx
    with torch.cuda.device_of(x):
        input_backward_kernel[(triton.cdiv(rows, config.rows),)](
            dy,
            weight,
            dx,
            rows,
            *x.shape[2:],
            *dx.stride()[:4],
            **_constants(weight, config),
            INT64=needs_int64(dx, dy),
            num_warps=config.warps,
        )
    return dx


def _tokens(x: Tensor, weight: Tensor) -> int:
    """Return N, the tokens of a sample."""
    frames, lines, columns = (
        -(-n // p) for n, p in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    return frames * lines * columns


def _constants(weight: Tensor, config: Config) -> dict[str, int]:
    """Return the constants that all kernels share; products need 16 lanes or more."""
    depth = weight[0].numel()
    return {
        "C": weight.shape[0],
        "K": depth,
        "K_LANES": max(16, triton.next_power_of_2(depth)),
        "PT": weight.shape[2],
        "PH": weight.shape[3],
        "PW": weight.shape[4],
        "M": config.rows,
        "N": config.channels,
    }
