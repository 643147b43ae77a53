"""Test that faults planted in kernels are found, though the values they leave may be right."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora import testing
from opensora.sanitizer import MARGIN, guard_memory, surround, watch_interpreter

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own, see the end"
)


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, SEEN: tl.constexpr, KEPT: tl.constexpr, M: tl.constexpr):
    rows = tl.program_id(0) * M + tl.arange(0, M)
    x = tl.load(x_ptr + rows, mask=rows < N + SEEN, other=0.0)
    tl.store(y_ptr + rows, x, mask=rows < N + KEPT)


@triton.jit
def blocks_kernel(x_ptr, y_ptr, KEPT: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    at = tl.program_id(0) * M + lanes
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=lanes < M), mask=lanes < M + KEPT)


@triton.jit
def neighbour_kernel(x_ptr, M: tl.constexpr, STEP: tl.constexpr):
    rows = tl.program_id(0) * M + tl.arange(0, M)
    x = tl.load(x_ptr + (rows + STEP) % (2 * M))
    tl.store(x_ptr + rows, x)


@triton.jit
def reverse_kernel(x_ptr, y_ptr, M: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    rows = tl.arange(0, M)
    tl.store(y_ptr + rows, tl.load(x_ptr + rows))
    if FIRST:
        tl.debug_barrier()
    y = tl.load(y_ptr + M - 1 - rows)
    if SECOND:
        tl.debug_barrier()
    tl.store(y_ptr + rows, y)


def run(launch: Callable[[Tensor, Tensor], object]) -> Tensor:
    """Launch on 8 numbers in the middle of 24, from x to y."""
    x, y = torch.arange(24.0), torch.zeros(24)
    with watch_interpreter():
        launch(x[8:16], y[8:16])
    return y[8:16]


def refuses(launch: Callable[[Tensor, Tensor], object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(launch)


@interpreted
def test_sound_kernels_pass() -> None:
    expected = torch.arange(8.0, 16.0)
    assert torch.equal(run(lambda x, y: copy_kernel[(2,)](x, y, 8, 0, 0, M=4)), expected)
    assert torch.equal(run(lambda x, y: copy_kernel[(1,)](x, y, 8, 0, 0, M=16)), expected)
    assert torch.equal(run(lambda x, y: blocks_kernel[(2,)](x, y, 0, M=4, LANES=8)), expected)
    run(lambda x, _: neighbour_kernel[(2,)](x, M=4, STEP=0))
    flipped = run(lambda x, y: reverse_kernel[(1,)](x, y, M=8, FIRST=True, SECOND=True))
    assert torch.equal(flipped, expected.flip(0))


@interpreted
def test_a_wrong_mask_edge() -> None:
    refuses(lambda x, y: copy_kernel[(1,)](x, y, 8, 1, 0, M=16), "a load reaches outside")
    refuses(lambda x, y: copy_kernel[(1,)](x, y, 8, 0, 1, M=16), "a store reaches outside")
    refuses(lambda x, y: copy_kernel[(1,)](x[1:], y, 8, 0, 0, M=8), "a load reaches outside")
    x = torch.arange(8.0)
    refuses(lambda _, y: copy_kernel[(1,)](x[4:], y[:4], 5, 0, -1, M=8), "a load reaches outside")


@interpreted
def test_programs_that_store_to_one_address() -> None:
    # In turns the second program repairs what the first one spoils.
    refuses(
        lambda x, y: blocks_kernel[(2,)](x, y, 1, M=4, LANES=8),
        "store reaches outside|two programs of a launch store to the same address",
    )
    refuses(
        lambda x, y: blocks_kernel[(1, 2)](x, y, 0, M=4, LANES=8),
        "two programs of a launch store to the same address",
    )


@interpreted
def test_a_program_that_loads_what_another_stores() -> None:
    for step in (1, 4):
        refuses(
            lambda x, _, step=step: neighbour_kernel[(2,)](x, M=4, STEP=step),
            "barrier|a program loads what another program of its launch stores",
        )


@interpreted
def test_a_missing_barrier() -> None:
    refuses(
        lambda x, y: reverse_kernel[(1,)](x, y, M=8, FIRST=False, SECOND=True),
        "a load needs a barrier after an earlier store",
    )
    refuses(
        lambda x, y: reverse_kernel[(1,)](x, y, M=8, FIRST=True, SECOND=False),
        "a store needs a barrier after an earlier load",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_allocations_are_poisoned_and_their_ends_guarded(dtype: torch.dtype) -> None:
    like = torch.zeros(3, 2, 4, dtype=dtype).transpose(0, 1)
    with guard_memory():
        found = [torch.empty(2, 3, dtype=dtype), torch.empty_like(like), like.new_empty(5)]
        assert [t.dtype for t in found] == [dtype] * 3
        assert found[1].stride() == like.stride()
        for t in found:
            assert t.isnan().all() if dtype.is_floating_point else (t == -1).all()
            t.zero_()
    for place in (-1, 5):
        with pytest.raises(AssertionError, match=r"\[5\] was written to past its ends"):
            write_at(place, dtype)


def write_at(place: int, dtype: torch.dtype) -> None:
    with guard_memory():
        t = torch.empty(5, dtype=dtype)
        t.as_strided((1,), (1,), t.storage_offset() + place).zero_()


def test_drawn_tensors_stand_between_nan() -> None:
    x = testing.randn(3, 5, dtype=torch.bfloat16)
    assert x.is_contiguous()
    storage = x.as_strided((2 * MARGIN + 15,), (1,), 0)
    assert storage[:MARGIN].isnan().all()
    assert storage[-MARGIN:].isnan().all()
    assert not x.isnan().any()
    assert surround(x.double()).shape == x.shape


def test_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "barrier or mask or program or sound")
