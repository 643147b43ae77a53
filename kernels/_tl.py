"""Share device functions between kernels: rows of any width in registers, 64-bit offsets.

A row of C columns is held as a head of HEAD columns, a power of two, and a tail of TAIL columns.
C = 1152 is 1024 + 128 with no lane idle, where one block of 2048 would mask 44 % of its lanes.
Where TAIL is 0 the head covers the whole row, masked, and the tail repeats it and is not used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def split_row(columns: int) -> tuple[int, int]:
    """Return (HEAD, TAIL), powers of two that cover `columns`; TAIL may be 0.

    A tail is taken where it saves a quarter of the lanes or more.
    """
    covering = triton.next_power_of_2(columns)
    head = covering // 2
    tail = triton.next_power_of_2(columns - head) if columns > head else 0
    return (head, tail) if head + tail <= covering * 3 // 4 else (covering, 0)


def needs_int64(*tensors: torch.Tensor) -> bool:
    """Tell whether an element of some tensor lies 2^31 elements or more from its first one."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) >= 2**31
        for t in tensors
    )


@triton.jit
def offset(index, stride, INT64: tl.constexpr):
    """Return index * stride, in 64 bits where the host asks for it."""
    if INT64:
        return index.to(tl.int64) * stride
    else:  # a bare return after it would be compiled too, and its type does not match
        return index * stride


@triton.jit
def load_row(
    ptr,  # first column of a dense row [C]
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Load a row as float32; lanes past its end are zero."""
    columns = tl.arange(0, HEAD)
    if TAIL == 0:
        head = tl.load(ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
        return head, head
    else:
        head = tl.load(ptr + columns).to(tl.float32)
        rest = HEAD + tl.arange(0, TAIL)
        return head, tl.load(ptr + rest, mask=rest < C, other=0.0).to(tl.float32)


@triton.jit
def store_row(
    ptr,  # first column of a dense row [C]
    head,
    tail,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Store a row, rounded once to the pointer's dtype."""
    columns = tl.arange(0, HEAD)
    if TAIL == 0:
        tl.store(ptr + columns, head.to(ptr.dtype.element_ty), mask=columns < C)
    else:
        tl.store(ptr + columns, head.to(ptr.dtype.element_ty))
        rest = HEAD + tl.arange(0, TAIL)
        tl.store(ptr + rest, tail.to(ptr.dtype.element_ty), mask=rest < C)


@triton.jit
def sum_row(head, tail, TAIL: tl.constexpr):
    """Sum a row whose lanes past the end are zero."""
    total = tl.sum(head, axis=0)
    if TAIL > 0:
        total += tl.sum(tail, axis=0)
    return total


@triton.jit
def normalise_row(head, tail, eps, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Return (row - mean) * rstd, with lanes past the end zero, and rstd; two-pass variance."""
    mean = sum_row(head, tail, TAIL) / C
    head -= mean
    tail -= mean
    if TAIL == 0:
        head = tl.where(tl.arange(0, HEAD) < C, head, 0.0)
    else:
        tail = tl.where(HEAD + tl.arange(0, TAIL) < C, tail, 0.0)
    rstd = tl.rsqrt(sum_row(head * head, tail * tail, TAIL) / C + eps)
    return head * rstd, tail * rstd, rstd


@triton.jit
def load_tile(
    rows_ptr,  # [M] first columns of dense rows [C]
    seen,  # [M] rows to load
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Load rows in the pointer's dtype: head [M, HEAD], tail [M, TAIL]; other lanes are zero."""
    columns = tl.arange(0, HEAD)[None, :]
    if TAIL == 0:
        mask = seen[:, None] & (columns < C)
        head = tl.load(rows_ptr[:, None] + columns, mask=mask, other=0.0)
        return head, head
    else:
        head = tl.load(rows_ptr[:, None] + columns, mask=seen[:, None], other=0.0)
        rest = HEAD + tl.arange(0, TAIL)[None, :]
        mask = seen[:, None] & (rest < C)
        return head, tl.load(rows_ptr[:, None] + rest, mask=mask, other=0.0)


@triton.jit
def store_tile(
    rows_ptr,  # [M] first columns of dense rows [C]
    seen,  # [M] rows to store
    head,
    tail,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Store rows, rounded once to the pointer's dtype."""
    columns = tl.arange(0, HEAD)[None, :]
    head = head.to(rows_ptr.dtype.element_ty)
    if TAIL == 0:
        tl.store(rows_ptr[:, None] + columns, head, mask=seen[:, None] & (columns < C))
    else:
        tl.store(rows_ptr[:, None] + columns, head, mask=seen[:, None])
        rest = HEAD + tl.arange(0, TAIL)[None, :]
        tail = tail.to(rows_ptr.dtype.element_ty)
        tl.store(rows_ptr[:, None] + rest, tail, mask=seen[:, None] & (rest < C))


@triton.jit
def sum_tile(head, tail, TAIL: tl.constexpr):
    """Sum the columns of every row [M] of a tile whose lanes past the end are zero."""
    total = tl.sum(head, axis=1)
    if TAIL > 0:
        total += tl.sum(tail, axis=1)
    return total


@triton.jit
def even_columns(x):
    """Return columns 0, 2, ... of x [M, W]."""
    even, _ = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return even


@triton.jit
def rotate_pairs(x, cos, sin):
    """Rotate the pairs (2i, 2i + 1) of x [M, W] by angles [M or 1, W / 2]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape)


@triton.jit
def rotate_tile(x, x_tail, cos, cos_tail, sin, sin_tail, TAIL: tl.constexpr):
    """Rotate the pairs of every row of a tile by angles [M or 1, columns / 2]."""
    if TAIL == 0:
        return rotate_pairs(x, cos, sin), x_tail
    else:
        return rotate_pairs(x, cos, sin), rotate_pairs(x_tail, cos_tail, sin_tail)
