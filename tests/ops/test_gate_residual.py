"""Test `gate_residual`: every implementation against the reference in float64."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora import testing
from opensora.functional import gate_residual
from opensora.kernels import gate_residual as kernels
from opensora.ops import gate_residual as op
from opensora.testing import Implementation, alternate, assert_as_exact_as, double, randn

# STDiT3-XL's width with an odd row over, the tiny model's, one token, odd and ragged widths; a
# float32 tile holds 16 rows of 17 to 33 columns.
SHAPES = [(2, 2, 3, 1152), (1, 2, 5, 128), (3, 1, 17), (2, 1, 2, 33), (1, 2, 1000), (1, 1, 17, 33)]
DTYPES = [torch.float32, torch.bfloat16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


dispatched = partial(testing.dispatched, op._forward, op._backward)

IMPLEMENTATIONS = testing.implementations()
if INTERPRETED:  # interpreted Triton takes what CUDA would
    op.DTYPES["cpu"] = op.DTYPES["cuda"]
# Schema, fakes and autograd are tested on the C++ kernels, or on the references without a compiler.
through_dispatcher = testing.require if op._forward.kernel("cpu") == "C++" else dispatched
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
with_and_without_select = pytest.mark.parametrize("selected", [False, True])
Args = list[Any]


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, selected: bool, device: str = "cpu"
) -> Args:
    """Return the op's arguments; gates are strided views of one [B, 6, C], as in STDiT3."""
    batch, channels = shape[0], shape[-1]
    frames = shape[1] if len(shape) == 4 else 1
    x, y = (randn(*shape, dtype=dtype, device=device, seed=s).requires_grad_() for s in (1, 2))
    table = randn(batch, 6, channels, dtype=dtype, device=device, seed=3)
    gate, gate0 = (table[:, i].requires_grad_() for i in (2, 5))
    if not selected:
        return [x, y, gate, None, None]
    return [x, y, gate, alternate(batch, frames, device), gate0]


def call(args: Args) -> Tensor:
    x, y, gate, select, gate0 = args
    return gate_residual(x, y, gate, select=select, gate0=gate0)


def gradients(z: Tensor, args: Args, grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(z, inputs, grad.to(z.device, z.dtype))


def assert_gradients_match(args: Args, grad: Tensor, implementation: Implementation) -> None:
    with implementation.activate():
        actual = gradients(call(args), args, grad)
    working, exact = gradients(op.reference(*args), args, grad), double(args)
    truth = gradients(op.reference(*exact), exact, grad)
    for one, other, true in zip(working, actual, truth, strict=True):
        assert_as_exact_as(one, other, true)


@each_shape
@each_dtype
@with_and_without_select
@each_implementation
def test_forward_matches_reference(
    implementation: Implementation, selected: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    args = arguments(shape, dtype, selected, implementation.device)
    with implementation.activate(), torch.no_grad():
        z = call(args)
    assert_as_exact_as(op.reference(*args), z, op.reference(*double(args)))


@each_shape
@each_dtype
@with_and_without_select
@each_implementation
def test_backward_matches_reference(
    implementation: Implementation, selected: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    args = arguments(shape, dtype, selected, implementation.device)
    assert_gradients_match(args, randn(*shape, seed=5).to(dtype), implementation)


@with_and_without_select
@pytest.mark.parametrize(
    "implementation", [i for i in IMPLEMENTATIONS if not i.name.startswith("C++")], ids=str
)
def test_float16_matches_reference(implementation: Implementation, selected: bool) -> None:
    args = arguments(SHAPES[1], torch.float16, selected, implementation.device)
    with implementation.activate(), torch.no_grad():
        z = call(args)
    assert_as_exact_as(op.reference(*args), z, op.reference(*double(args)))
    grad = randn(*SHAPES[1], seed=5).to(torch.float16)
    assert_gradients_match(args, grad, implementation)


@pytest.mark.parametrize("rows", [31, 32, 33, 70])
@with_and_without_select
@each_implementation
def test_gradients_add_up_over_many_rows(
    implementation: Implementation, selected: bool, rows: int
) -> None:
    shape = (1, 2, rows, 16) if selected else (1, rows, 16)  # a backward program takes 32 rows
    args = arguments(shape, torch.bfloat16, selected, implementation.device)
    assert_gradients_match(args, randn(*shape, seed=5).bfloat16(), implementation)


@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_is_the_model_s_formula(masked: bool) -> None:
    x, y, gate, select, gate0 = arguments((2, 3, 5, 16), torch.bfloat16, masked)
    x, y = x.flatten(1, 2), y.flatten(1, 2)
    expected = x + gate[:, None] * y
    if masked:
        chosen = torch.where(select[:, :, None], gate[:, None], gate0[:, None])
        expected = x + (chosen[:, :, None] * y.view(2, 3, 5, 16)).flatten(1, 2)
    assert torch.equal(op.reference(x, y, gate, select, gate0), expected)


@with_and_without_select
def test_reference_backward_equals_autograd(selected: bool) -> None:
    args = double(arguments((2, 3, 5, 33), torch.float32, selected))
    grad = randn(2, 3, 5, 33, dtype=torch.float64, seed=5)
    dx, dy, *dgates = gradients(op.reference(*args), args, grad)
    mine, dgate = op.reference_backward(grad, *args[1:])
    torch.testing.assert_close(dx, grad)
    torch.testing.assert_close(mine, dy)
    torch.testing.assert_close(dgate, torch.stack(dgates, dim=1))


@with_and_without_select
def test_gradcheck(selected: bool) -> None:
    args = double(arguments((2, 3, 2, 5), torch.float32, selected))
    assert torch.autograd.gradcheck(lambda *a: call(list(a)), args)


@each_implementation
@given(
    batch=st.integers(1, 3),
    frames=st.integers(1, 4),
    patches=st.integers(1, 9),
    channels=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    batch: int,
    frames: int,
    patches: int,
    channels: int,
    dtype: torch.dtype,
) -> None:
    shape = (batch, frames, patches, channels)
    args = arguments(shape, dtype, True, implementation.device)
    with implementation.activate():
        z = call(args)
    assert_as_exact_as(op.reference(*args), z, op.reference(*double(args)))
    assert_gradients_match(args, randn(*shape, seed=5).to(dtype), implementation)


@each_implementation
def test_select_chooses_the_gate_of_each_frame(implementation: Implementation) -> None:
    x, y, gate, select, gate0 = arguments((2, 3, 2, 64), torch.float32, True, implementation.device)
    with implementation.activate(), torch.no_grad():
        mixed = call([x, y, gate, select, gate0])
        chosen, other = gate_residual(x, y, gate), gate_residual(x, y, gate0)
        flat = call([x.flatten(1, 2), y.flatten(1, 2), gate, select, gate0])
    assert torch.equal(mixed, torch.where(select[:, :, None, None], chosen, other))
    assert torch.equal(flat, mixed.flatten(1, 2))


@each_implementation
def test_the_branch_may_have_another_dtype(implementation: Implementation) -> None:
    for wide, narrow in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        args = arguments((2, 5, 40), wide, False, implementation.device)
        args[1] = args[1].detach().to(narrow).requires_grad_()
        with implementation.activate():
            z = call(args)
            _, dy, dgate = gradients(z, args, randn(2, 5, 40, seed=5))
        assert (z.dtype, dy.dtype, dgate.dtype) == (wide, narrow, wide)
        assert_as_exact_as(op.reference(*args), z, op.reference(*double(args)))
        assert_gradients_match(args, randn(2, 5, 40, seed=5).to(wide), implementation)


@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    args = arguments((2, 3, 2, 48), torch.float32, False, implementation.device)
    wide = randn(2, 2, 3, 96, device=implementation.device, seed=6)
    strided = [wide.transpose(1, 2)[..., ::2], wide.transpose(1, 2)[..., 1::2], *args[2:]]
    strided[2] = randn(48, 2, device=implementation.device).T  # columns not dense
    grad = randn(2, 2, 3, 48, device=implementation.device, seed=7).transpose(1, 2)
    results = []
    for values in (strided, [a.contiguous() if isinstance(a, Tensor) else a for a in strided]):
        inputs = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in values]
        with implementation.activate():
            z = call(inputs)
            results.append((z, *gradients(z, inputs, grad)))
            inputs[2] = inputs[2].detach()[:1].expand(2, 48)  # row stride 0
            results[-1] += (call(inputs),)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 5, 16), (2, 3, 0, 16), (2, 0, 16), (0, 4, 16)], ids=str)
@with_and_without_select
@each_implementation
def test_empty_batch(
    implementation: Implementation, selected: bool, shape: tuple[int, ...]
) -> None:
    args = arguments(shape, torch.float32, selected, implementation.device)
    with implementation.activate():
        z = call(args)
        dx, dy, *dgates = gradients(z, args, torch.ones(shape))
    assert z.shape == dx.shape == dy.shape == shape
    assert all(torch.equal(dgate, torch.zeros_like(dgate)) for dgate in dgates)


@each_dtype
@each_implementation
def test_extreme_values(implementation: Implementation, dtype: torch.dtype) -> None:
    args = arguments((1, 6, 160), dtype, False, implementation.device)
    x, y, gate = (a.detach().clone() for a in args[:3])
    x[0, 1, 3], y[0, 2, 5], gate[0, 7] = torch.nan, torch.nan, torch.nan
    x[0, 3], y[0, 3] = x[0, 3] * 1e4, y[0, 3] * -1e4
    x[0, 4], y[0, 4] = x[0, 4] * 1e-6, y[0, 4] * 1e-6
    gate[0, 9] = 0
    args[:3] = x, y, gate
    with implementation.activate():
        z = call(args)
    truth = op.reference(*double(args))
    for row in range(6):  # row by row: the tolerance follows the largest error
        rows = slice(row, row + 1)
        working = op.reference(x[:, rows], y[:, rows], gate, None, None)
        assert_as_exact_as(working, z[:, rows], truth[:, rows])


@each_implementation
def test_a_frame_that_overflowed_stays_out_of_the_other_gate(
    implementation: Implementation,
) -> None:
    args = arguments((1, 3, 2, 16), torch.float32, True, implementation.device)
    args[3] = torch.tensor([[True, False, True]], device=implementation.device)
    grad = randn(1, 3, 2, 16, seed=5)
    grad[0, 1] = torch.inf
    with implementation.activate():
        *_, dgate, dgate0 = gradients(call(args), args, grad)
    assert dgate.isfinite().all()
    assert not dgate0.isfinite().any()


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    args = arguments((1, 2, 35, 32), torch.bfloat16, True, implementation.device)
    grad = randn(1, 2, 35, 32, dtype=torch.bfloat16, seed=5)
    runs = []
    for _ in range(2):
        with implementation.activate():
            z = call(args)
            runs.append((z, *gradients(z, args, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_implementation
def test_gates_are_cast_to_the_dtype_of_x(implementation: Implementation) -> None:
    x, y, gate, *_ = arguments((2, 4, 32), torch.float32, False, implementation.device)
    x, y = x.detach().bfloat16(), y.detach().bfloat16()
    with implementation.activate():
        z = gate_residual(x, y, gate)
        expected = gate_residual(x, y, gate.bfloat16())
        (dgate,) = torch.autograd.grad(z.sum(), gate)
    assert torch.equal(z, expected)
    assert z.dtype == torch.bfloat16
    assert dgate.dtype == torch.float32


@each_implementation
def test_gradients_of_some_inputs(implementation: Implementation) -> None:
    args = arguments((2, 3, 4, 32), torch.float32, True, implementation.device)
    grad = randn(2, 3, 4, 32, seed=5)
    with implementation.activate():
        every = gradients(call(args), args, grad)
        for kept, index in ((0, 0), (1, 1), (4, 3)):
            some = [a.detach() if isinstance(a, Tensor) else a for a in args]
            some[kept].requires_grad_()
            (only,) = gradients(call(some), some, grad)
            assert torch.equal(only, every[index])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[-1:], ids=str)
def test_opcheck(implementation: Implementation) -> None:
    if implementation.device != "cpu":
        pytest.skip("the ops are checked on the CPU")
    with through_dispatcher():
        for selected in (False, True):
            args = [
                a.detach() if isinstance(a, Tensor) else a
                for a in arguments((1, 2, 2, 8), torch.float32, selected)
            ]
            torch.library.opcheck(op._forward.overload, tuple(args))
            torch.library.opcheck(op._backward.overload, tuple(args))
            args[1] = args[1].bfloat16()
            torch.library.opcheck(op._backward.overload, tuple(args))


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_compiles_without_graph_break(mode: str) -> None:
    args = arguments((2, 3, 4, 32), torch.float32, True)
    grad = randn(2, 3, 4, 32, seed=5)
    eager = gradients(call(args), args, grad)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    with through_dispatcher(), testing._mode(mode):
        compiled = torch.compile(lambda *a: call(list(a)), fullgraph=True, backend="aot_eager")
        z = compiled(*args)
        torch.testing.assert_close(z, op.reference(*args))
        torch.testing.assert_close(gradients(z, args, grad), eager)
        with torch.no_grad():
            torch.compile(lambda *a: call(list(a)), fullgraph=True, backend=backend)(*args)
    kept = mode == "require" or op._forward.kernel("cpu") == "C++"
    assert ("gate_residual_forward" in graphs[0]) is kept


def test_a_required_kernel_that_cannot_run_raises() -> None:
    args = arguments((1, 2, 8), torch.float64, False)
    assert call(args).dtype == torch.float64
    with testing.require(), pytest.raises(NotImplementedError, match=r"float64 on 'cpu'.*cuda: "):
        call(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x must be float \[B, N, C\]"),
        ({"x": torch.zeros(2, 6, 8, dtype=torch.int64)}, "x must be float"),
        ({"y": torch.zeros(2, 3, 2, 8)}, r"y must be float \[2, 6, 8\].* got .* \[2, 3, 2, 8\]"),
        ({"y": torch.zeros(2, 6, 8, dtype=torch.int32)}, "y must be .* got torch.int32"),
        ({"y": torch.zeros(2, 6, 8, device="meta")}, "y must be .* on cpu"),
        ({"gate": torch.zeros(2, 1, 8)}, r"gate must be \[B, C\] = \[2, 8\]"),
        ({"gate0": torch.zeros(3, 8)}, r"gate0 must be .* got torch.float32 \[3, 8\]"),
        ({"gate": torch.zeros(2, 8, device="meta")}, "gate must be .* on cpu"),
        ({"select": None}, "come together"),
        ({"gate0": None}, "come together"),
        ({"select": torch.ones(2, 3)}, "select must be bool"),
        ({"select": torch.ones(2, 4, dtype=torch.bool)}, "4 frames, which does not fit"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Tensor | None], message: str) -> None:
    good = {
        "x": torch.zeros(2, 6, 8),
        "y": torch.zeros(2, 6, 8),
        "gate": torch.zeros(2, 8),
        "select": torch.ones(2, 3, dtype=torch.bool),
        "gate0": torch.zeros(2, 8),
    }
    gate_residual(**good)
    with pytest.raises(ValueError, match=message):
        gate_residual(**(good | change))


@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments((1, 2, 3, 96), torch.float32, True, implementation.device)
    grad = randn(1, 2, 3, 96, seed=5)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
        with implementation.activate():
            z = call(args)
            results.append((z, *gradients(z, args, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("channels", [1, 16, 128, 1000, 1152, 2048, 5000, 40000])
@pytest.mark.parametrize("rows", [1, 3, 1590])
@pytest.mark.parametrize("accesses", [5, 9])
def test_launch_parameters_are_powers_of_two(channels: int, rows: int, accesses: int) -> None:
    for itemsize in (2, 4):
        config = kernels.Config.heuristic(channels, rows, itemsize, accesses)
        for value in (config.warps, config.tile, config.run):
            assert value >= 1
            assert value & (value - 1) == 0
        assert config.warps <= 32
        assert config.tile < 2 * rows
        assert config.run % config.tile == 0


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")
