"""Share flash attention between kernels: a tile of one side against all rows of the other.

A head of D columns is held as a head part of HEAD columns, a power of two, and a tail of TAIL
columns: D = 72 is 64 + 16 with 8 lanes idle, where one block of 128 would idle 56. A product runs
over both parts: 80 multiply-accumulates of which 72 are useful.

Scores may be scaled by one factor per row of the streamed side, which is how a norm of that side
costs no pass over it: q'k is (q' * w) k times the k row's 1 / rms. Powers are of two: `scale` is
log2(e) / sqrt(D), rounded once, and a log-sum-exp is to base two as well.
Axes: M rows of the tile held in registers, N rows streamed, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from opensora.kernels._tl import load_row, load_tile, offset, sum_tile

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(1 / LOG2E)


@dataclass(frozen=True)
class Tile:
    """Hold the launch parameters of one kernel."""

    rows: int  # M, held in registers
    streamed: int  # N, a step of the loop
    warps: int
    stages: int


def split_head(width: int) -> tuple[int, int]:
    """Return (HEAD, TAIL), powers of two of 16 or more that cover `width`; TAIL may be 0."""
    covering = max(triton.next_power_of_2(width), 16)
    head = covering // 2
    tail = max(triton.next_power_of_2(width - head), 16) if width > head >= 16 else covering
    return (head, tail) if head + tail < covering else (covering, 0)


@triton.jit
def load_rows(
    ptr,  # [count, D], dense rows `stride` apart
    rows,
    stride,
    count,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    INT64: tl.constexpr,
):
    """Load rows as (head part, tail); zeros past column D and past row `count`."""
    return load_tile(ptr + offset(rows, stride, INT64), rows < count, D, HEAD, TAIL)


@triton.jit
def outer(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """Return a b' [M, N], summed over D."""
    x = tl.dot(a, tl.trans(b), input_precision="ieee")
    if TAIL > 0:
        x = tl.dot(a_tail, tl.trans(b_tail), x, input_precision="ieee")
    return x


@triton.jit
def accumulate(p, b, b_tail, total, total_tail, TAIL: tl.constexpr):
    """Return the tile total + p b, with p [M, N] rounded to b's dtype."""
    p = p.to(b.dtype)
    total = tl.dot(p, b, total, input_precision="ieee")
    if TAIL > 0:
        total_tail = tl.dot(p, b_tail, total_tail, input_precision="ieee")
    return total, total_tail


@triton.jit
def zeros(M: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Return a float32 tile of zeros."""
    head = tl.zeros([M, HEAD], tl.float32)
    if TAIL == 0:
        return head, head
    else:
        return head, tl.zeros([M, TAIL], tl.float32)


@triton.jit
def _scores(x, factor_ptr, rows, count, scale, MASK: tl.constexpr, FACTOR: tl.constexpr):
    """Scale products [M, N] by `scale` and the rows' factors.

    With MASK those past `count` become -inf, by an addition that fuses with the product: a mask on
    the last tile alone would save nothing but its own comparisons.
    """
    if FACTOR:
        factor = tl.load(factor_ptr + rows, mask=rows < count, other=0.0)
        x *= (factor * scale)[None, :]
    else:
        x *= scale
    if MASK:
        x += tl.where(rows < count, 0.0, float("-inf"))[None, :]
    return x


@triton.jit
def attend(
    q,
    q_tail,
    k_ptr,  # [count, D], dense rows `stride` apart; v likewise
    v_ptr,
    factor_ptr,  # [count] float32, read if FACTOR
    stride,
    count,
    scale,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    N: tl.constexpr,
    FACTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Return the tile softmax(q k') v, and the log-sum-exp of the scores [M].

    Without keys the tile is zero and the log-sum-exp -inf.
    """
    M: tl.constexpr = q.shape[0]
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    o, o_tail = zeros(M, HEAD, TAIL)
    for start in range(0, count, N):
        rows = start + tl.arange(0, N)
        k, k_tail = load_rows(k_ptr, rows, stride, count, D, HEAD, TAIL, INT64)
        x = outer(q, q_tail, k, k_tail, TAIL)
        x = _scores(x, factor_ptr, rows, count, scale, True, FACTOR)
        higher = tl.maximum(top, tl.max(x, axis=1))
        p = tl.exp2(x - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, axis=1)
        o *= decay[:, None]
        if TAIL > 0:
            o_tail *= decay[:, None]
        v, v_tail = load_rows(v_ptr, rows, stride, count, D, HEAD, TAIL, INT64)
        o, o_tail = accumulate(p, v, v_tail, o, o_tail, TAIL)
        top = higher
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    o *= share[:, None]
    if TAIL > 0:
        o_tail *= share[:, None]
    return o, o_tail, top + tl.log2(total)


@triton.jit
def query_gradient(
    q,
    q_tail,
    do,
    do_tail,
    lse,  # [M]
    delta,  # [M]: sum of do * o
    k_ptr,  # [count, D], dense rows `stride` apart; v likewise
    v_ptr,
    factor_ptr,  # [count] float32, read if FACTOR
    stride,
    count,
    scale,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    N: tl.constexpr,
    FACTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Return the gradient of q, float32; with FACTOR that of q before k's weight multiplied it."""
    dq, dq_tail = zeros(q.shape[0], HEAD, TAIL)
    for start in range(0, count, N):
        rows = start + tl.arange(0, N)
        k, k_tail = load_rows(k_ptr, rows, stride, count, D, HEAD, TAIL, INT64)
        v, v_tail = load_rows(v_ptr, rows, stride, count, D, HEAD, TAIL, INT64)
        x = outer(q, q_tail, k, k_tail, TAIL)
        x = _scores(x, factor_ptr, rows, count, scale, True, FACTOR)
        dx = outer(do, do_tail, v, v_tail, TAIL) - delta[:, None]
        dx *= tl.exp2(x - lse[:, None])
        if FACTOR:
            dx *= tl.load(factor_ptr + rows, mask=rows < count, other=0.0)[None, :]
        dq, dq_tail = accumulate(dx, k, k_tail, dq, dq_tail, TAIL)
    dq *= scale * LN2
    if TAIL > 0:
        dq_tail *= scale * LN2
    return dq, dq_tail


@triton.jit
def key_gradient(
    k,
    k_tail,
    v,
    v_tail,
    q_ptr,  # [last, D], dense rows `stride` apart
    do_ptr,  # [last, D], dense rows `do_stride` apart
    factor_ptr,  # [last] float32, read if FACTOR
    lse_ptr,  # [last] float32
    delta_ptr,  # [last] float32
    stride,
    do_stride,
    first,
    last,
    scale,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    N: tl.constexpr,
    FACTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Return the gradients of k and v from queries `first` to `last`, float32; cf. query_gradient.

    Queries past `last` need no mask: their do and delta are zero and their weights finite.
    """
    dk, dk_tail = zeros(k.shape[0], HEAD, TAIL)
    dv, dv_tail = zeros(k.shape[0], HEAD, TAIL)
    for start in range(first, last, N):
        rows = start + tl.arange(0, N)
        q, q_tail = load_rows(q_ptr, rows, stride, last, D, HEAD, TAIL, INT64)
        do, do_tail = load_rows(do_ptr, rows, do_stride, last, D, HEAD, TAIL, INT64)
        lse = tl.load(lse_ptr + rows, mask=rows < last, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < last, other=0.0)
        x = outer(k, k_tail, q, q_tail, TAIL)
        x = _scores(x, factor_ptr, rows, last, scale, False, FACTOR)
        p = tl.exp2(x - lse[None, :])
        dv, dv_tail = accumulate(p, do, do_tail, dv, dv_tail, TAIL)
        dx = p * (outer(v, v_tail, do, do_tail, TAIL) - delta[None, :])
        if FACTOR:
            dx *= tl.load(factor_ptr + rows, mask=rows < last, other=0.0)[None, :]
        dk, dk_tail = accumulate(dx, q, q_tail, dk, dk_tail, TAIL)
    dk *= scale * LN2
    if TAIL > 0:
        dk_tail *= scale * LN2
    return dk, dk_tail, dv, dv_tail


@triton.jit
def inverse_rms(x, x_tail, eps, D: tl.constexpr, TAIL: tl.constexpr):
    x, x_tail = x.to(tl.float32), x_tail.to(tl.float32)
    return tl.rsqrt(sum_tile(x * x, x_tail * x_tail, TAIL) / D + eps)


@triton.jit
def fold_weights(
    x,
    x_tail,
    rstd,  # [M]
    weight_ptr,  # [D], of x's side and of the other side
    other_ptr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Return x * rstd * weight * other, rounded once."""
    weight, weight_tail = load_row(weight_ptr, D, HEAD, TAIL)
    other, other_tail = load_row(other_ptr, D, HEAD, TAIL)
    head = (x * rstd[:, None] * (weight * other)[None, :]).to(x.dtype)
    if TAIL == 0:
        return head, head
    else:
        return head, (x_tail * rstd[:, None] * (weight_tail * other_tail)[None, :]).to(x.dtype)


@triton.jit
def norm_gradient(
    g,  # gradient of the products with the raw other side, [M, D]; lanes past D are zero
    g_tail,
    x,
    x_tail,
    rstd,  # [M]; zero past the end of the frame
    weight_ptr,  # [D], of x's side and of the other side
    other_ptr,
    partial_ptr,  # [D] float32: this tile's share of the weight's gradient
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Return the gradient of x: rstd * (gw - n * mean(gw * n)), with gw = g * other * weight."""
    weight, weight_tail = load_row(weight_ptr, D, HEAD, TAIL)
    other, other_tail = load_row(other_ptr, D, HEAD, TAIL)
    n, n_tail = x * rstd[:, None], x_tail * rstd[:, None]
    g *= other[None, :]
    columns = tl.arange(0, HEAD)
    tl.store(partial_ptr + columns, tl.sum(g * n, axis=0), mask=columns < D)
    g *= weight[None, :]
    if TAIL == 0:
        mean = tl.sum(g * n, axis=1) / D
        dx = rstd[:, None] * (g - n * mean[:, None])
        return dx, dx
    else:
        g_tail *= other_tail[None, :]
        rest = HEAD + tl.arange(0, TAIL)
        tl.store(partial_ptr + rest, tl.sum(g_tail * n_tail, axis=0), mask=rest < D)
        g_tail *= weight_tail[None, :]
        mean = (tl.sum(g * n, axis=1) + tl.sum(g_tail * n_tail, axis=1)) / D
        dx_tail = rstd[:, None] * (g_tail - n_tail * mean[:, None])
        return rstd[:, None] * (g - n * mean[:, None]), dx_tail
