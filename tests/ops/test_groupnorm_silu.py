"""Test `groupnorm_silu`: every implementation against the reference in float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora import testing
from opensora.functional import groupnorm_silu
from opensora.kernels import groupnorm_silu as kernels
from opensora.ops import groupnorm_silu as op
from opensora.ops._channels_last import channels_last
from opensora.testing import Implementation, assert_as_exact_as, double, randn

# (shape, groups). A tile holds 32 pixels of 128 channels (64 of y, 16 of the gradients), a program
# of the statistics takes four of them; then groups of three, more channels than a block, widths of
# no power of two, few channels, a single pixel, a single value.
CASES = [
    ((1, 128, 1, 31), 2),
    ((2, 128, 3, 11), 4),
    ((1, 128, 1, 127), 2),
    ((1, 128, 3, 1, 43), 1),
    ((1, 96, 2, 3, 5), 32),
    ((1, 192, 4, 8), 6),
    ((1, 52, 2, 3), 4),
    ((2, 4, 9, 9), 2),
    ((1, 6, 2, 2, 3), 6),
    ((2, 5, 1, 1), 5),
]
DTYPES = [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = testing.implementations()
if IMPLEMENTATIONS[0].name == "Triton interpreted":  # which takes what CUDA would
    op.DTYPES["cpu"] = op.DTYPES["cuda"]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
Args = list[Any]


def arguments(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, device: str = "cpu", silu: bool = True
) -> Args:
    """Return the op's arguments; every channel has its own mean and spread."""
    channels = [1, -1, *[1] * (len(shape) - 2)]
    x = randn(*shape, seed=1) * (1 + randn(shape[1], seed=2).abs()).view(channels)
    x = channels_last((x + randn(shape[1], seed=3).view(channels)).to(device, dtype))
    weight = 1 + randn(shape[1], dtype=dtype, device=device, seed=4) * 0.5
    bias = randn(shape[1], dtype=dtype, device=device, seed=5) * 0.5
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    return [*tensors, groups, 1e-5, silu]


def call(args: Args) -> Tensor:
    return groupnorm_silu(*args[:4], eps=args[4], silu=args[5])


def gradients(y: Tensor, args: Args, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, args[:3], grad.to(y.device, y.dtype))


def assert_matches(args: Args, grad: Tensor, implementation: Implementation) -> None:
    """Compare the result and all gradients with the reference in float64."""
    with implementation.activate():
        y = call(args)
        actual = (y, *gradients(y, args, grad))
    assert channels_last(y) is y
    y, exact = op.reference(*args), double(args)
    working = (y, *gradients(y, args, grad))
    y = op.reference(*exact)
    truth = (y, *gradients(y, exact, grad))
    for one, other, true in zip(working[:2], actual[:2], truth[:2], strict=True):
        assert_as_exact_as(one, other, true)
    for own, row, true in zip(working[2:], actual[2:], truth[2:], strict=True):
        # Sums over all pixels, whose order is the kernel's own: the largest sets the scale.
        noise = 2 * (own.double() - true).abs().max() + 1e-5 * true.abs().max() + 1e-12
        allowed = noise + torch.finfo(row.dtype).eps * true.abs()
        assert row.dtype == args[1].dtype
        assert ((row.detach().double() - true).abs() <= allowed).all()


@each_case
@each_implementation
def test_forward_and_backward_match_reference(
    implementation: Implementation, shape: tuple[int, ...], groups: int
) -> None:
    args = arguments(shape, groups, torch.float32, implementation.device)
    assert_matches(args, randn(*shape, seed=6), implementation)


# Tiles so small that every edge is met: block, pixels, chunks, joined, warps.
@pytest.mark.parametrize("tiles", [(16, 4, 5, 2, 1), (8, 8, 3, 4, 2), (32, 2, 9, 1, 1)], ids=str)
@each_implementation
def test_any_tiling(
    implementation: Implementation, tiles: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.Config, "heuristic", lambda *_: kernels.Config(*tiles))
    args = arguments((1, 20, 3, 7), 4, torch.float32, implementation.device)
    assert_matches(args, randn(1, 20, 3, 7, seed=6), implementation)


@pytest.mark.parametrize("silu", [False, True])
@each_dtype
@each_implementation
def test_silu_can_be_left_out(
    implementation: Implementation, dtype: torch.dtype, silu: bool
) -> None:
    args = arguments((2, 32, 3, 5, 7), 4, dtype, implementation.device, silu)
    assert_matches(args, randn(2, 32, 3, 5, 7, seed=6).to(dtype), implementation)


def test_reference_is_what_the_models_compute() -> None:
    norm = torch.nn.GroupNorm(4, 32, eps=1e-6)
    for shape in ((2, 32, 5, 7), (2, 32, 3, 5, 7)):
        x, weight, bias, *_ = arguments(shape, 4, torch.float32)
        norm.weight, norm.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        x = x.detach().contiguous()
        assert torch.equal(op.reference(x, weight, bias, 4, 1e-6, True), F.silu(norm(x)))
        assert torch.equal(op.reference(x, weight, bias, 4, 1e-6, False), norm(x))
        plain = op.reference(x, weight, bias, 4, 1e-6, True)
        assert plain.is_contiguous()
        last = op.reference(channels_last(x), weight, bias, 4, 1e-6, True)
        assert channels_last(last) is last
        assert torch.equal(last, plain)


@pytest.mark.parametrize("silu", [False, True])
def test_reference_backward_equals_autograd(silu: bool) -> None:
    args = double(arguments((2, 12, 2, 3, 5), 4, torch.float32, silu=silu))
    x, weight, bias, groups, eps, _ = args
    grad = randn(*x.shape, dtype=torch.float64, seed=6)
    grouped = x.detach().reshape(2, groups, -1)
    variance, mean = torch.var_mean(grouped, dim=-1, correction=0)
    mean_rstd = torch.stack((mean, torch.rsqrt(variance + eps)), dim=-1)
    mine = op.reference_backward(grad, x, weight, bias, mean_rstd, silu)
    for one, other in zip(mine, gradients(op.reference(*args), args, grad), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("silu", [False, True])
def test_gradcheck(silu: bool) -> None:
    args = double(arguments((2, 4, 2, 1, 3), 2, torch.float32, silu=silu))
    assert torch.autograd.gradcheck(lambda *tensors: call([*tensors, *args[3:]]), args[:3])


@each_implementation
@given(
    shape=st.lists(st.integers(1, 5), min_size=3, max_size=4),
    groups=st.integers(1, 9),
    width=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation, shape: list[int], groups: int, width: int, dtype: torch.dtype
) -> None:
    batch, *pixels = shape
    shape = [batch, groups * width, *pixels]
    args = arguments(tuple(shape), groups, dtype, implementation.device)
    # Not float32's noise over none: few values may be alike, and what divides them is eps then.
    args[4] = 1e-2
    grad = randn(*shape, seed=6).to(dtype)
    assert_matches(args, grad, implementation)


@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    args = arguments((2, 16, 3, 4, 5), 4, torch.float32, implementation.device)
    x = args[0].detach()
    wide = torch.zeros(2, 16, 3, 4, 10, device=x.device)
    wide[..., ::2] = x
    rows = torch.stack((args[1].detach(), args[2].detach()), dim=1)
    grad = randn(2, 16, 3, 5, 4, seed=6).to(x.device).transpose(3, 4)
    with implementation.activate():
        expected = call(args)
        dx = gradients(expected, args, grad.contiguous())[0]
        for layout in (x.contiguous(), wide[..., ::2]):
            strided = layout.requires_grad_()
            y = call([strided, rows[:, 0], rows[:, 1], *args[3:]])
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
            (mine,) = torch.autograd.grad(y, strided, grad)
            torch.testing.assert_close(mine, dx, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (0, 8, 2, 3, 3), (2, 8, 0, 3)], ids=str)
@each_implementation
def test_empty_batch(implementation: Implementation, shape: tuple[int, ...]) -> None:
    args = arguments(shape, 4, torch.float32, implementation.device)
    with implementation.activate():
        y = call(args)
        dx, dweight, dbias = gradients(y, args, torch.ones(shape))
    assert y.shape == dx.shape == shape
    if shape[0] == 0:  # torch divides by the pixels, of which there are none
        assert not dweight.any()
    assert not dbias.any()


@each_dtype
@each_implementation
def test_extreme_values(implementation: Implementation, dtype: torch.dtype) -> None:
    # One sample each: the tolerance follows the largest error.
    args = arguments((7, 32, 9, 17), 4, dtype, implementation.device)
    x = args[0].detach().clone()
    x[0] = 7.0  # no variance
    x[1] = x[1] * 1e-3 + 300  # a mean far above the spread
    x[2] *= 1e15
    x[3, 5, 2, 3] = torch.nan  # one group
    x[4] *= 1e-20
    x[5] = x[5] * 1e-2 + torch.arange(32, device=x.device).view(-1, 1, 1).to(dtype)  # by channel
    x[6, :, 8, 16] = 1e4  # the last pixel
    with implementation.activate(), torch.no_grad():
        y = call([x, *args[1:]])
    exact = double([x, *args[1:]])
    for i in range(7):
        working = op.reference(x[i : i + 1], *args[1:])
        truth = op.reference(exact[0][i : i + 1], *exact[1:])
        assert_as_exact_as(working, y[i : i + 1], truth)


@each_implementation
def test_large_means_keep_their_variance(implementation: Implementation) -> None:
    # In float32 a sum of squares of 1000 has no digit left for a spread of 0.01: the variance of
    # this input would be 0, or negative.
    x = channels_last((randn(1, 8, 3, 40, 40) * 0.01 + 1000).float().to(implementation.device))
    row = torch.ones(8, device=implementation.device)
    with implementation.activate():
        y = groupnorm_silu(x, row, 0 * row, 2, silu=False)
    truth = op.reference(x.double(), row.double(), 0 * row.double(), 2, 1e-6, False)
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=2e-2)


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    args = arguments((1, 128, 3, 10, 10), 32, torch.bfloat16, implementation.device)
    grad = randn(1, 128, 3, 10, 10, dtype=torch.bfloat16, seed=6)
    runs = []
    for _ in range(2):
        with implementation.activate():
            y = call(args)
            runs.append((y, *gradients(y, args, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_implementation
def test_a_sample_does_not_depend_on_its_batch(implementation: Implementation) -> None:
    args = arguments((3, 64, 11, 13), 4, torch.float32, implementation.device)
    with implementation.activate(), torch.no_grad():
        together = call(args)
        for i in range(3):
            alone = call([channels_last(args[0][i : i + 1]), *args[1:]])
            assert torch.equal(alone[0], together[i])


@each_implementation
def test_weight_and_bias_are_cast_to_the_dtype_of_x(implementation: Implementation) -> None:
    args = arguments((1, 8, 3, 4), 2, torch.float32, implementation.device)
    x, weight, bias = args[0].detach().bfloat16(), args[1], args[2]
    with implementation.activate():
        y = groupnorm_silu(x, weight, bias, 2)
        assert torch.equal(y, groupnorm_silu(x, weight.bfloat16(), bias.bfloat16(), 2))
        (dweight,) = torch.autograd.grad(y.sum(), weight)
    assert y.dtype == torch.bfloat16
    assert dweight.dtype == torch.float32


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the launchers, interpreted in this process, as kernels of the CPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    library = torch.library.Library("opensora", "FRAGMENT")
    for each in (op._forward, op._backward):
        library.impl(each.name, each.launcher, "CPU")
        monkeypatch.setitem(each._kernels, "cpu", "Triton")
    yield
    library._destroy()


@pytest.mark.usefixtures("on_cpu")
@each_implementation
def test_opcheck(implementation: Implementation) -> None:
    if implementation.name == "reference":
        pytest.skip("the CPU has no kernel of this op; interpreted Triton stands in for one")
    args = arguments((1, 8, 2, 3, 5), 2, torch.float32, implementation.device)
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(op._forward.overload, tuple(args))
    x, weight, bias, groups, eps, silu = args
    mean_rstd = op._forward._call(x, weight, bias, groups, eps, silu)[1]
    torch.library.opcheck(op._backward.overload, (x, x, weight, bias, mean_rstd, silu))


@pytest.mark.usefixtures("on_cpu")
@each_implementation
def test_compiles_without_graph_break(implementation: Implementation) -> None:
    args = arguments((1, 8, 2, 3, 5), 2, torch.float32, implementation.device)
    grad = randn(1, 8, 2, 3, 5, seed=6)
    mode = "auto" if implementation.name == "reference" else "require"
    with testing._mode(mode):
        eager = call(args)
        compiled = torch.compile(lambda *a: call(list(a)), fullgraph=True, backend="aot_eager")
        y = compiled(*args)
        torch.testing.assert_close(y, eager)
        expected = gradients(eager, args, grad)
        torch.testing.assert_close(gradients(y, args, grad), expected)


def test_a_required_kernel_that_cannot_run_raises() -> None:
    args = arguments((1, 8, 2, 2), 2, torch.float64)
    assert call(args).dtype == torch.float64
    with testing.require(), pytest.raises(NotImplementedError, match="float64 on 'cpu'"):
        call(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 3)}, r"x must be float \[B, C, H, W\]"),
        ({"x": torch.zeros(2, 8, 3, 3, dtype=torch.int64)}, "x must be float"),
        ({"num_groups": 3}, "num_groups must divide C = 8, got 3"),
        ({"num_groups": 0}, "num_groups must divide"),
        ({"weight": torch.zeros(7)}, r"weight must be \[C = 8\] on cpu, got torch.float32 \[7\]"),
        ({"bias": torch.zeros(8, 1)}, "bias must be"),
        ({"bias": torch.zeros(8, device="meta")}, "bias must be .* on cpu, got .* on meta"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Any], message: str) -> None:
    good = {
        "x": torch.zeros(2, 8, 3, 3),
        "weight": torch.zeros(8),
        "bias": torch.zeros(8),
        "num_groups": 4,
    }
    groupnorm_silu(**good)
    with pytest.raises(ValueError, match=message):
        groupnorm_silu(**(good | change))


@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments((2, 48, 3, 10, 10), 4, torch.float32, implementation.device)
    grad = randn(2, 48, 3, 10, 10, seed=6)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
        with implementation.activate():
            y = call(args)
            results.append((y, *gradients(y, args, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("frames", "expected"), [(2, False), (34, True)])
def test_int64_offsets_are_asked_for_at_720p(frames: int, expected: bool) -> None:
    from opensora.launches import record

    x = torch.empty(1, 128, frames, 720, 1280, dtype=torch.bfloat16, device="meta")
    x = channels_last(x)
    row = torch.empty(128, dtype=torch.bfloat16, device="meta")

    def launch() -> None:
        _, mean_rstd = kernels.forward(x, row, row, 32, 1e-6, True)
        kernels.backward(x, x, row, row, mean_rstd, True)

    launches = record(launch)
    assert [one.constants["INT64"] for one in launches] == [expected] * 5
    assert all(0 < size < 2**31 for one in launches for size in one.grid)


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")
