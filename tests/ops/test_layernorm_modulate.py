"""Test `layernorm_modulate`: every implementation against the reference in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora import testing
from opensora.functional import layernorm_modulate
from opensora.kernels import layernorm_modulate as kernels
from opensora.kernels._tl import needs_int64
from opensora.ops import layernorm_modulate as op
from opensora.testing import Implementation, alternate, assert_as_exact_as, double, randn

# STDiT3-XL's width, the tiny model's, a single token, single frames, odd and ragged widths.
SHAPES = [(2, 2, 3, 1152), (1, 2, 5, 128), (3, 1, 17), (2, 1, 2, 33), (1, 2, 1000)]
DTYPES = [torch.float32, torch.bfloat16]
each_implementation = pytest.mark.parametrize("implementation", testing.implementations(), ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
with_and_without_select = pytest.mark.parametrize("selected", [False, True])


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, selected: bool, device: str = "cpu"
) -> list[Tensor | float | None]:
    """Return the op's arguments; modulations are strided views of one [B, 6, C], as in STDiT3."""
    batch, channels = shape[0], shape[-1]
    frames = shape[1] if len(shape) == 4 else 1
    x = (randn(*shape, seed=1) * 3 + 1).to(device, dtype).requires_grad_()
    table = randn(batch, 6, channels, dtype=dtype, device=device, seed=2) * 0.5
    rows = [table[:, i].requires_grad_() for i in range(4)]
    if not selected:
        return [x, rows[0], rows[1], None, None, None, 1e-6]
    select = alternate(batch, frames, device)
    return [x, rows[0], rows[1], select, rows[2], rows[3], 1e-6]


def call(args: list[Tensor | float | None]) -> Tensor:
    x, shift, scale, select, shift0, scale0, eps = args
    return layernorm_modulate(x, shift, scale, select=select, shift0=shift0, scale0=scale0, eps=eps)


def gradients(y: Tensor, args: list[Tensor | float | None], grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(y, inputs, grad.to(y.device, y.dtype))


@each_shape
@each_dtype
@with_and_without_select
@each_implementation
def test_forward_matches_reference(
    implementation: Implementation, selected: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    args = arguments(shape, dtype, selected, implementation.device)
    with implementation.activate(), torch.no_grad():
        y = call(args)
    assert_as_exact_as(op.reference(*args), y, op.reference(*double(args)))


@each_shape
@each_dtype
@with_and_without_select
@each_implementation
def test_backward_matches_reference(
    implementation: Implementation, selected: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    args = arguments(shape, dtype, selected, implementation.device)
    grad = randn(*shape, seed=4).to(dtype)
    with implementation.activate():
        actual = gradients(call(args), args, grad)
    working = gradients(op.reference(*args), args, grad)
    exact = double(args)
    truth = gradients(op.reference(*exact), exact, grad)
    for one, other, true in zip(working, actual, truth, strict=True):
        assert_as_exact_as(one, other, true)


@each_implementation
def test_gradients_add_up_over_many_rows(implementation: Implementation) -> None:
    args = arguments((1, 70, 16), torch.bfloat16, False, implementation.device)
    grad = randn(1, 70, 16, seed=4).bfloat16()  # C++ takes 64 rows to a partial sum, Triton 32
    with implementation.activate():
        actual = gradients(call(args), args, grad)
    working, exact = gradients(op.reference(*args), args, grad), double(args)
    truth = gradients(op.reference(*exact), exact, grad)
    for one, other, true in zip(working, actual, truth, strict=True):
        assert_as_exact_as(one, other, true)


@with_and_without_select
def test_reference_backward_equals_autograd(selected: bool) -> None:
    args = double(arguments((2, 3, 5, 33), torch.float32, selected))
    x, _, scale, select, _, scale0, eps = args
    grad = randn(2, 3, 5, 33, dtype=torch.float64, seed=4)
    dx, *drows = gradients(op.reference(*args), args, grad)
    mine, dmodulation = op.reference_backward(grad, x, scale, select, scale0, eps)
    torch.testing.assert_close(mine, dx)
    torch.testing.assert_close(dmodulation, torch.stack(drows, dim=1))


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
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    batch: int,
    frames: int,
    patches: int,
    channels: int,
    dtype: torch.dtype,
) -> None:
    args = arguments((batch, frames, patches, channels), dtype, True, implementation.device)
    with implementation.activate(), torch.no_grad():
        y = call(args)
    assert_as_exact_as(op.reference(*args), y, op.reference(*double(args)))


@each_implementation
def test_select_chooses_the_modulation_of_each_frame(implementation: Implementation) -> None:
    x, shift, scale, select, shift0, scale0, eps = arguments(
        (2, 3, 2, 64), torch.float32, True, implementation.device
    )
    with implementation.activate(), torch.no_grad():
        mixed = call([x, shift, scale, select, shift0, scale0, eps])
        chosen = layernorm_modulate(x, shift, scale)
        other = layernorm_modulate(x, shift0, scale0)
        flat = call([x.flatten(1, 2), shift, scale, select, shift0, scale0, eps])
    expected = torch.where(select[:, :, None, None], chosen, other)
    assert torch.equal(mixed, expected)
    assert torch.equal(flat, mixed.flatten(1, 2))


@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    args = arguments((2, 3, 2, 48), torch.float32, False, implementation.device)
    wide = randn(2, 2, 3, 96, device=implementation.device, seed=5)
    strided = [wide.transpose(1, 2)[..., ::2], *args[1:]]
    strided[1] = randn(1, 48, device=implementation.device).expand(2, 48)  # row stride 0
    strided[2] = randn(48, 2, device=implementation.device).T  # columns not dense
    strided[0].requires_grad_()
    dense = [a.contiguous() if isinstance(a, Tensor) else a for a in strided]
    grad = randn(2, 2, 3, 48, seed=6).transpose(1, 2)
    with implementation.activate():
        y, expected = call(strided), call(dense)
        (dx,) = torch.autograd.grad(y, strided[0], grad.to(y.device))
        (other,) = torch.autograd.grad(expected, strided[0], grad.contiguous().to(y.device))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(dx, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 5, 16), (2, 3, 0, 16), (2, 0, 16), (0, 4, 16)], ids=str)
@with_and_without_select
@each_implementation
def test_empty_batch(
    implementation: Implementation, selected: bool, shape: tuple[int, ...]
) -> None:
    args = arguments(shape, torch.float32, selected, implementation.device)
    with implementation.activate():
        y = call(args)
        dx, *drows = gradients(y, args, torch.ones(shape))
    assert y.shape == dx.shape == shape
    assert all(torch.equal(row, torch.zeros_like(row)) for row in drows)


@each_dtype
@each_implementation
def test_extreme_values(implementation: Implementation, dtype: torch.dtype) -> None:
    args = arguments((1, 6, 160), dtype, False, implementation.device)
    x = args[0].detach().clone()
    x[0, 0] = 7.0  # no variance
    x[0, 1] = x[0, 1] * 1e-3 + 300  # a mean far above the spread
    x[0, 2] *= 1e15
    x[0, 3, 5] = torch.nan
    x[0, 4] *= 1e-20
    args[0] = x
    with implementation.activate(), torch.no_grad():
        y = call(args)
    truth = op.reference(*double(args))
    for row in range(6):  # row by row: the tolerance follows the largest error
        working = op.reference(x[:, row : row + 1], *args[1:])
        assert_as_exact_as(working, y[:, row : row + 1], truth[:, row : row + 1])


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    args = arguments((1, 3, 70, 32), torch.bfloat16, True, implementation.device)
    grad = randn(1, 3, 70, 32, dtype=torch.bfloat16, seed=4)
    runs = []
    before = torch.get_num_threads()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        with implementation.activate():
            y = call(args)
            runs.append((y, *gradients(y, args, grad)))
    torch.set_num_threads(before)
    if implementation.name != "reference":  # its sums may split by threads
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[2], runs[0], strict=True))


@each_implementation
def test_modulation_is_cast_to_the_dtype_of_x(implementation: Implementation) -> None:
    args = arguments((2, 4, 32), torch.float32, False, implementation.device)
    x = args[0].detach().bfloat16()
    with implementation.activate():
        y = layernorm_modulate(x, args[1], args[2])
        expected = layernorm_modulate(x, args[1].bfloat16(), args[2].bfloat16())
        (dscale,) = torch.autograd.grad(y.sum(), args[2])
    assert torch.equal(y, expected)
    assert y.dtype == torch.bfloat16
    assert dscale.dtype == torch.float32


def test_opcheck() -> None:
    for selected in (False, True):
        args = [
            a.detach() if isinstance(a, Tensor) else a
            for a in arguments((2, 3, 4, 32), torch.float32, selected)
        ]
        x, _, scale, select, _, scale0, eps = args
        torch.library.opcheck(op._forward.overload, tuple(args))
        torch.library.opcheck(op._backward.overload, (x, x, scale, select, scale0, eps))


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_compiles_without_graph_break(mode: str) -> None:
    args = arguments((2, 3, 4, 32), torch.float32, True)
    grad = randn(2, 3, 4, 32, seed=4)
    eager = gradients(call(args), args, grad)
    with testing._mode(mode):
        compiled = torch.compile(lambda *a: call(list(a)), fullgraph=True, backend="aot_eager")
        y = compiled(*args)
        torch.testing.assert_close(y, call(args))
        torch.testing.assert_close(gradients(y, args, grad), eager)


def test_compiled_code_keeps_what_is_required_or_compiled_itself() -> None:
    args = arguments((2, 4, 32), torch.float32, False)
    compiled = op._forward.kernel("cpu") == "C++"
    for mode, expected in (("auto", compiled), ("require", True)):
        graphs: list[str] = []

        def backend(
            graph: torch.fx.GraphModule, _: object, graphs: list[str] = graphs
        ) -> torch.fx.GraphModule:
            graphs.append(graph.print_readable(print_output=False))
            return graph

        with testing._mode(mode), torch.no_grad():
            torch.compile(lambda *a: call(list(a)), fullgraph=True, backend=backend)(*args)
        assert ("layernorm_modulate_forward" in graphs[0]) is expected


def test_a_required_kernel_that_cannot_run_raises() -> None:
    args = arguments((1, 2, 8), torch.float64, False)
    assert call(args).dtype == torch.float64
    with testing.require(), pytest.raises(NotImplementedError, match=r"float64 on 'cpu'.*cpu: "):
        call(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x must be float \[B, N, C\]"),
        ({"x": torch.zeros(2, 6, 8, dtype=torch.int64)}, "x must be float"),
        ({"shift": torch.zeros(2, 1, 8)}, r"shift must be \[B, C\] = \[2, 8\]"),
        ({"scale": torch.zeros(3, 8)}, r"scale must be .* got torch.float32 \[3, 8\]"),
        ({"scale0": torch.zeros(2, 9)}, "scale0 must be"),
        ({"select": None}, "come together"),
        ({"shift0": None}, "come together"),
        ({"select": torch.ones(2, 3)}, "select must be bool"),
        ({"select": torch.ones(3, 3, dtype=torch.bool)}, "select must be bool"),
        ({"select": torch.ones(2, 4, dtype=torch.bool)}, "4 frames, which does not fit"),
        ({"x": torch.zeros(2, 2, 3, 8)}, "3 frames, which does not fit"),
        ({"scale": torch.zeros(2, 8, device="meta")}, "scale must be .* on cpu"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Tensor | None], message: str) -> None:
    row = torch.zeros(2, 8)
    good = {
        "x": torch.zeros(2, 6, 8),
        "shift": row,
        "scale": row,
        "select": torch.ones(2, 3, dtype=torch.bool),
        "shift0": row,
        "scale0": row,
    }
    layernorm_modulate(**good)
    with pytest.raises(ValueError, match=message):
        layernorm_modulate(**(good | change))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 6, 8).half(), torch.zeros(2, 8, 6).mT, torch.zeros(3, 6, 8), torch.zeros(8)],
    ids=["dtype", "layout", "batch", "dimensions"],
)
def test_the_bare_op_refuses_what_its_kernel_cannot_read(x: Tensor) -> None:
    row = torch.zeros(2, 8, dtype=x.dtype)
    with pytest.raises(RuntimeError):
        op._forward(x, row, row, None, None, None, 1e-6)
    with pytest.raises(RuntimeError):
        op._backward(x, x, row, None, None, 1e-6)


@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments((1, 2, 3, 96), torch.float32, True, implementation.device)
    grad = randn(1, 2, 3, 96, seed=4)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
        with implementation.activate():
            y = call(args)
            results.append((y, *gradients(y, args, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_int64_offsets_are_asked_for_from_2_31_elements_on() -> None:
    assert not needs_int64(torch.empty(2**31, device="meta"))
    assert needs_int64(torch.empty(2**31 + 1, device="meta"))
    assert needs_int64(torch.empty(2**30 + 2, device="meta").as_strided((3, 2), (2**30, 1)))


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")


def test_works_without_the_compiled_library(tmp_path: Path) -> None:
    code = """
import importlib.resources, pathlib, sys
importlib.resources.files = lambda package: pathlib.Path(sys.argv[1])
import torch
from opensora import _extension, testing
from opensora.functional import layernorm_modulate
assert _extension.path is None and _extension.instruction_set() is None
x, row = torch.randn(2, 4, 8, requires_grad=True), torch.zeros(2, 8)
layernorm_modulate(x, row, row).sum().backward()
try:
    with testing.require():
        layernorm_modulate(x, row, row)
except NotImplementedError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert "cpu: none installed; cuda: Triton" in run.stdout
