"""Time `layernorm_modulate`: ratios to the eager reference and to a copy, in interleaved pairs.

A copy moves the bytes of the forward (read x, write y) into memory allocated like y; the backward
reads dy and x and writes dx, 1.5 times as many. Only the ratios carry over to another machine.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.shapes import TOKENS
from bench.static import Static
from opensora import testing
from opensora.functional import layernorm_modulate
from opensora.kernels import layernorm_modulate as triton_kernels
from opensora.ops import layernorm_modulate as op
from opensora.testing import Implementation, randn

KERNELS = [i for i in testing.implementations() if i.name != "reference"]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)
each_shape = pytest.mark.parametrize("shape", TOKENS)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def static_case(channels: int, selected: bool) -> Static:
    """Launch both kernels on meta tensors of 480p-2s, at any width."""
    batch, frames, patches, _ = TOKENS["480p-2s"]
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    x = torch.empty(batch, frames, patches, channels, **meta)
    row = torch.empty(batch, 6, channels, **meta)[:, 0]
    select, other = None, None
    if selected:
        select, other = torch.empty(batch, frames, dtype=torch.bool, device="meta"), row

    def launch() -> None:
        triton_kernels.forward(x, row, row, select, other, other, 1e-6)
        triton_kernels.backward(x, x, row, select, other, 1e-6)

    return Static(launch)


STATIC = {
    "480p-2s": static_case(1152, False),
    "480p-2s per frame": static_case(1152, True),
    "2048 wide": static_case(2048, True),
}


def report(benchmark: BenchmarkFixture, times: dict[str, list[float]], copies: float) -> None:
    """Print and record the kernel's speed over the reference and its share of copy bandwidth."""
    ratios = testing.median_ratios(times, to="kernel")
    benchmark.extra_info["times_faster_than_reference"] = round(ratios["reference"], 2)
    benchmark.extra_info["fraction_of_copy_bandwidth"] = round(copies * ratios["copy"], 2)
    print(f"\n{benchmark.name}: {benchmark.extra_info}")


@each_kernel
@each_dtype
@each_shape
@pytest.mark.parametrize("selected", [False, True])
def bench_forward(
    benchmark: BenchmarkFixture,
    kernel: Implementation,
    dtype: torch.dtype,
    shape: str,
    selected: bool,
) -> None:
    batch, frames, _, channels = TOKENS[shape]
    x = randn(*TOKENS[shape], dtype=dtype, device=kernel.device)
    rows = randn(batch, 6, channels, dtype=dtype, device=kernel.device, seed=1).unbind(1)
    select, other = None, (None, None)
    if selected:
        select, other = randn(batch, frames, device=kernel.device, seed=2) > 0, rows[2:4]

    def run() -> object:
        return layernorm_modulate(
            x, rows[0], rows[1], select=select, shift0=other[0], scale0=other[1]
        )

    with kernel.activate(), torch.no_grad():
        benchmark(run)
        times = testing.interleave(
            {
                "kernel": run,
                "reference": lambda: op.reference(x, *rows[:2], select, *other, 1e-6),
                "copy": x.clone,
            }
        )
    report(benchmark, times, copies=1.0)


@each_kernel
@each_dtype
@each_shape
def bench_backward(
    benchmark: BenchmarkFixture, kernel: Implementation, dtype: torch.dtype, shape: str
) -> None:
    batch, _, _, channels = TOKENS[shape]
    x = randn(*TOKENS[shape], dtype=dtype, device=kernel.device).requires_grad_()
    grad = randn(*TOKENS[shape], dtype=dtype, device=kernel.device, seed=3)
    rows = randn(batch, 6, channels, dtype=dtype, device=kernel.device, seed=1)
    shift, scale = rows[:, 0].requires_grad_(), rows[:, 1].requires_grad_()

    def run() -> object:
        return op._backward(grad, x, scale, None, None, 1e-6)

    y = op.reference(x, shift, scale, None, None, None, 1e-6)

    def reference() -> object:
        return torch.autograd.grad(y, (x, shift, scale), grad, retain_graph=True)

    with kernel.activate():
        benchmark(run)
        times = testing.interleave({"kernel": run, "reference": reference, "copy": grad.clone})
    report(benchmark, times, copies=1.5)
