"""Share what queries and keys go through before they attend; cf. `opensora/ops/_heads.py`.

`prepare` normalises, weights and rotates rows. Backward takes from the scores what the norm needs:
with x the rows, q = prepare(x) and s = q k', the mean over D of q's gradient times q is that of
ds k times q, and so the sum over keys of ds * s, divided by D: no sum over D is taken again.
Axes: M rows of a tile, T positions, D head width, held as HEAD + TAIL columns as in `_tl.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opensora.kernels._tl import even_columns, load_row, load_tile, rotate_tile


@triton.jit
def relay(x):
    """Return x [M] in a layout of its own."""
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def inverse_rms(x, x_tail, eps, D: tl.constexpr, TAIL: tl.constexpr):
    """Return 1 / rms of every row [M]."""
    x = x.to(tl.float32)
    total = tl.sum(x * x, axis=1)
    if TAIL > 0:
        x_tail = x_tail.to(tl.float32)
        total += relay(tl.sum(x_tail * x_tail, axis=1))
    return tl.rsqrt(total / D + eps)


@triton.jit
def load_angles(rows_ptr, seen, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Load rows of a table [T, D]: one column of each pair, which are equal. Half the registers."""
    x, x_tail = load_tile(rows_ptr, seen, D, HEAD, TAIL)
    return even_columns(x.to(tl.float32)), even_columns(x_tail.to(tl.float32))


@triton.jit
def prepare(
    x,
    x_tail,
    rstd,  # [M]: 1 / rms(x), used if NORM
    weight_ptr,  # [D] dense, read if NORM
    cos_ptr,  # [T, D] dense, equal in pairs, read if ROTARY, like sin
    sin_ptr,
    t,
    seen,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Return the rows normalised, weighted and rotated, rounded to their dtype."""
    dtype = x.dtype
    x, x_tail = x.to(tl.float32), x_tail.to(tl.float32)
    if NORM:
        weight, weight_tail = load_row(weight_ptr, D, HEAD, TAIL)
        x = (x * rstd[:, None]).to(dtype).to(tl.float32) * weight[None, :]
        x_tail = x_tail * relay(rstd)[:, None]
        x_tail = x_tail.to(dtype).to(tl.float32) * weight_tail[None, :]
    if ROTARY:
        cos, cos_tail = load_angles(cos_ptr + t * D, seen, D, HEAD, TAIL)
        sin, sin_tail = load_angles(sin_ptr + t * D, seen, D, HEAD, TAIL)
        x, x_tail = rotate_tile(x, x_tail, cos, cos_tail, sin, sin_tail, TAIL)
    return x.to(dtype), x_tail.to(dtype)


@triton.jit
def load_prepared(
    rows_ptr,  # [M] first columns of queries or keys
    weight_ptr,
    cos_ptr,
    sin_ptr,
    t,
    seen,
    eps,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Load rows and prepare them."""
    x, x_tail = load_tile(rows_ptr, seen, D, HEAD, TAIL)
    rstd = inverse_rms(x, x_tail, eps, D, TAIL)
    return prepare(
        x, x_tail, rstd, weight_ptr, cos_ptr, sin_ptr, t, seen, D, HEAD, TAIL, NORM, ROTARY
    )


@triton.jit
def prepare_backward(
    g,  # gradient of the prepared rows, float32
    g_tail,
    rows_ptr,  # [M] first columns of the rows, read if NORM
    rstd,  # [M]: 1 / rms of the rows, used if NORM
    mean,  # [M]: mean over D of g times the prepared rows, used if NORM
    weight_ptr,  # [D] dense, read if NORM
    cos_ptr,  # [T, D] dense, equal in pairs, read if ROTARY, like sin
    sin_ptr,
    t,
    seen,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Return the gradient of the rows, and of the weight, summed over rows."""
    if ROTARY:
        cos, cos_tail = load_angles(cos_ptr + t * D, seen, D, HEAD, TAIL)
        sin, sin_tail = load_angles(sin_ptr + t * D, seen, D, HEAD, TAIL)
        g, g_tail = rotate_tile(g, g_tail, cos, cos_tail, -sin, -sin_tail, TAIL)
    if NORM:
        x, x_tail = load_tile(rows_ptr, seen, D, HEAD, TAIL)
        rstd_tail, mean_tail = relay(rstd)[:, None], relay(mean)[:, None]
        n, n_tail = x.to(tl.float32) * rstd[:, None], x_tail.to(tl.float32) * rstd_tail
        dweight, dweight_tail = tl.sum(g * n, axis=0), tl.sum(g_tail * n_tail, axis=0)
        weight, weight_tail = load_row(weight_ptr, D, HEAD, TAIL)
        g = rstd[:, None] * (g * weight[None, :] - n * mean[:, None])
        g_tail = rstd_tail * (g_tail * weight_tail[None, :] - n_tail * mean_tail)
        return g, g_tail, dweight, dweight_tail
    else:
        return g, g_tail, mean, mean
