"""Test `residual_layernorm_modulate`: every implementation against the reference in float64."""

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
from opensora.functional import gate_residual, layernorm_modulate, residual_layernorm_modulate
from opensora.kernels import residual_layernorm_modulate as kernels
from opensora.ops import residual_layernorm_modulate as op
from opensora.testing import Implementation, alternate, assert_as_exact_as, double, randn

# STDiT3-XL's width, the tiny model's, one token, odd and ragged widths.
SHAPES = [(2, 2, 2, 1152), (1, 2, 3, 128), (3, 1, 17), (2, 1, 2, 33), (1, 2, 1000)]
DTYPES = [torch.float32, torch.bfloat16]
#: (with a gate, with a choice per frame)
KINDS = [(True, False), (True, True), (False, False), (False, True)]
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
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
Args = list[Any]


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, kind: tuple[bool, bool], device: str = "cpu"
) -> Args:
    """Return the op's arguments; modulations are strided views of one [B, 6, C], as in STDiT3."""
    gated, selected = kind
    batch, channels = shape[0], shape[-1]
    frames = shape[1] if len(shape) == 4 else 1
    x, y = ((randn(*shape, seed=s) * 2 + s).to(device, dtype).requires_grad_() for s in (1, 2))
    table = randn(batch, 6, channels, dtype=dtype, device=device, seed=3)
    gate, shift, scale, gate0, shift0, scale0 = (table[:, i].requires_grad_() for i in range(6))
    gate, gate0 = (gate, gate0) if gated else (None, None)
    if not selected:
        return [x, y, gate, shift, scale, None, None, None, None, 1e-6]
    select = alternate(batch, frames, device)
    return [x, y, gate, shift, scale, select, gate0, shift0, scale0, 1e-6]


def call(args: Args) -> tuple[Tensor, Tensor]:
    names = ("select", "gate0", "shift0", "scale0", "eps")
    return residual_layernorm_modulate(*args[:5], **dict(zip(names, args[5:], strict=True)))


def gradients(
    results: tuple[Tensor, Tensor], args: Args, grads: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the gradients of all inputs; a result whose gradient is None stays unused."""
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    used = [
        (r, g.to(r.device, r.dtype)) for r, g in zip(results, grads, strict=True) if g is not None
    ]
    outputs, values = zip(*used, strict=True)
    found = torch.autograd.grad(outputs, inputs, values, allow_unused=True)
    return tuple(
        torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)
    )


def random_grads(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return randn(*shape, seed=5), randn(*shape, seed=6)


def assert_gradients_match(
    args: Args, grads: tuple[Tensor | None, Tensor | None], implementation: Implementation
) -> None:
    grads = tuple(None if g is None else g.to(args[0].dtype) for g in grads)
    with implementation.activate():
        actual = gradients(call(args), args, grads)
    working, exact = gradients(op.reference(*args), args, grads), double(args)
    truth = gradients(op.reference(*exact), exact, grads)
    for one, other, true in zip(working, actual, truth, strict=True):
        assert_as_exact_as(one, other, true)


@each_shape
@each_dtype
@each_kind
@each_implementation
def test_forward_matches_reference(
    implementation: Implementation,
    kind: tuple[bool, bool],
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    args = arguments(shape, dtype, kind, implementation.device)
    with implementation.activate(), torch.no_grad():
        results = call(args)
    working, truth = op.reference(*args), op.reference(*double(args))
    for actual, one, true in zip(results, working, truth, strict=True):
        assert_as_exact_as(one, actual, true)


@each_shape
@each_dtype
@each_kind
@each_implementation
def test_backward_matches_reference(
    implementation: Implementation,
    kind: tuple[bool, bool],
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    args = arguments(shape, dtype, kind, implementation.device)
    assert_gradients_match(args, random_grads(shape), implementation)


@each_kind
@each_implementation
def test_either_result_may_stay_unused(
    implementation: Implementation, kind: tuple[bool, bool]
) -> None:
    shape = (2, 2, 3, 40)
    args = arguments(shape, torch.float32, kind, implementation.device)
    dsum, dnormed = random_grads(shape)
    assert_gradients_match(args, (None, dnormed), implementation)
    assert_gradients_match(args, (dsum, None), implementation)


@pytest.mark.parametrize("rows", [32, 33])
@each_implementation
def test_gradients_add_up_over_many_rows(implementation: Implementation, rows: int) -> None:
    shape = (1, rows, 16)  # a backward program takes 32 rows
    args = arguments(shape, torch.bfloat16, (True, False), implementation.device)
    assert_gradients_match(args, random_grads(shape), implementation)


@each_kind
@each_implementation
def test_equals_the_two_ops_in_sequence(
    implementation: Implementation, kind: tuple[bool, bool]
) -> None:
    args = arguments((1, 2, 3, 64), torch.bfloat16, kind, implementation.device)
    # Around 300 a bfloat16 is a multiple of 2: the norm of an unrounded sum would be far off.
    args[0], args[1] = torch.full_like(args[0], 300), args[1].detach()
    x, y, gate, shift, scale, select, gate0, shift0, scale0, _ = args
    with implementation.activate(), torch.no_grad():
        total, normed = call(args)
    with torch.no_grad():
        added, exact = (
            a + b if gate is None else gate_residual(a, b, gate, select=select, gate0=gate0)
            for a, b in ((x, y), (x.double(), y.double()))
        )
        working, truth = (
            layernorm_modulate(t, shift, scale, select=select, shift0=shift0, scale0=scale0)
            for t in (total, total.double())
        )
    assert_as_exact_as(added, total, exact)
    assert_as_exact_as(working, normed, truth)


@each_kind
def test_reference_backward_equals_autograd(kind: tuple[bool, bool]) -> None:
    shape = (2, 3, 5, 33)
    args = double(arguments(shape, torch.float32, kind))
    _, y, gate, _, scale, select, gate0, _, scale0, eps = args
    total, _ = op.reference(*args)
    for dsum in (None, randn(*shape, dtype=torch.float64, seed=5)):
        dnormed = randn(*shape, dtype=torch.float64, seed=6)
        dx, dy, *drows = gradients(op.reference(*args), args, (dsum, dnormed))
        mine, branch, dmodulation = op.reference_backward(
            dsum, dnormed, total, y, gate, scale, select, gate0, scale0, eps
        )
        torch.testing.assert_close(mine, dx)
        torch.testing.assert_close(dy if gate is not None else dy[:0].flatten(), branch)
        torch.testing.assert_close(dmodulation, torch.stack(drows, dim=1))


@each_kind
def test_gradcheck(kind: tuple[bool, bool]) -> None:
    args = double(arguments((2, 3, 2, 5), torch.float32, kind))
    assert torch.autograd.gradcheck(lambda *a: call(list(a)), args)


@each_implementation
@given(
    batch=st.integers(1, 3),
    frames=st.integers(1, 3),
    patches=st.integers(1, 5),
    channels=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    batch: int,
    frames: int,
    patches: int,
    channels: int,
    dtype: torch.dtype,
    kind: tuple[bool, bool],
) -> None:
    args = arguments((batch, frames, patches, channels), dtype, kind, implementation.device)
    with implementation.activate(), torch.no_grad():
        results = call(args)
    working, truth = op.reference(*args), op.reference(*double(args))
    for actual, one, true in zip(results, working, truth, strict=True):
        assert_as_exact_as(one, actual, true)


@each_implementation
def test_select_chooses_the_modulation_of_each_frame(implementation: Implementation) -> None:
    args = arguments((2, 3, 2, 64), torch.float32, (True, True), implementation.device)
    x, y, gate, shift, scale, select, gate0, shift0, scale0, _ = args
    with implementation.activate(), torch.no_grad():
        mixed = call(args)
        chosen = residual_layernorm_modulate(x, y, gate, shift, scale)
        others = residual_layernorm_modulate(x, y, gate0, shift0, scale0)
        flat = call([x.flatten(1, 2), y.flatten(1, 2), *args[2:]])
    for result, one, other, same in zip(mixed, chosen, others, flat, strict=True):
        assert torch.equal(result, torch.where(select[:, :, None, None], one, other))
        assert torch.equal(same, result.flatten(1, 2))


@each_kind
@each_implementation
def test_the_branch_may_have_another_dtype(
    implementation: Implementation, kind: tuple[bool, bool]
) -> None:
    shape = (1, 2, 3, 40)
    args = arguments(shape, torch.float32, kind, implementation.device)
    args[1] = args[1].detach().bfloat16().requires_grad_()
    with implementation.activate():
        results = call(args)
        _, dy, *_ = gradients(results, args, random_grads(shape))
    assert [r.dtype for r in results] == [torch.float32] * 2
    assert dy.dtype == torch.bfloat16
    working, truth = op.reference(*args), op.reference(*double(args))
    for actual, one, true in zip(results, working, truth, strict=True):
        assert_as_exact_as(one, actual, true)
    assert_gradients_match(args, random_grads(shape), implementation)


@pytest.mark.parametrize(
    "implementation", [i for i in IMPLEMENTATIONS if not i.name.startswith("C++")], ids=str
)
def test_float16(implementation: Implementation) -> None:
    args = arguments((1, 2, 3, 48), torch.float16, (True, True), implementation.device)
    with implementation.activate(), torch.no_grad():
        results = call(args)
    working, truth = op.reference(*args), op.reference(*double(args))
    for actual, one, true in zip(results, working, truth, strict=True):
        assert_as_exact_as(one, actual, true)
    assert_gradients_match(args, random_grads((1, 2, 3, 48)), implementation)


@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    args = arguments((2, 3, 2, 48), torch.float32, (True, False), implementation.device)
    wide = randn(2, 2, 3, 96, device=implementation.device, seed=7).transpose(1, 2)
    strided = [wide[..., ::2], wide[..., 1::2], *args[2:]]
    strided[2] = randn(1, 48, device=implementation.device).expand(2, 48)  # row stride 0
    strided[4] = randn(48, 2, device=implementation.device).T  # columns not dense
    grads = tuple(
        randn(2, 2, 3, 48, device=implementation.device, seed=s).transpose(1, 2) for s in (8, 9)
    )
    results = []
    for values in (strided, [a.contiguous() if isinstance(a, Tensor) else a for a in strided]):
        inputs = [a.detach() if isinstance(a, Tensor) else a for a in values]
        for index in (0, 1, 3):
            inputs[index].requires_grad_()
        with implementation.activate():
            both = call(inputs)
            results.append((*both, *gradients(both, inputs, grads)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 5, 16), (2, 3, 0, 16), (2, 0, 16), (0, 4, 16)], ids=str)
@each_kind
@each_implementation
def test_empty_batch(
    implementation: Implementation, kind: tuple[bool, bool], shape: tuple[int, ...]
) -> None:
    args = arguments(shape, torch.float32, kind, implementation.device)
    with implementation.activate():
        results = call(args)
        dx, dy, *drows = gradients(results, args, (torch.ones(shape), torch.ones(shape)))
    assert results[0].shape == results[1].shape == dx.shape == dy.shape == shape
    assert all(torch.equal(row, torch.zeros_like(row)) for row in drows)


@each_dtype
@each_implementation
def test_extreme_values(implementation: Implementation, dtype: torch.dtype) -> None:
    args = arguments((1, 6, 160), dtype, (True, False), implementation.device)
    x, y = (a.detach().clone() for a in args[:2])
    x[0, 0], y[0, 0] = 7.0, 0.0  # no variance
    x[0, 1], y[0, 1] = x[0, 1] * 1e-3 + 300, 0.0  # a mean far above the spread
    x[0, 2], y[0, 2] = x[0, 2] * 1e15, y[0, 2] * 1e15
    x[0, 3, 5] = torch.nan
    x[0, 4], y[0, 4] = x[0, 4] * 1e-20, y[0, 4] * 1e-20
    args[:2] = x, y
    with implementation.activate(), torch.no_grad():
        results = call(args)
    truth = op.reference(*double(args))
    for row in range(6):  # row by row: the tolerance follows the largest error
        rows = slice(row, row + 1)
        working = op.reference(x[:, rows], y[:, rows], *args[2:])
        for actual, one, true in zip(results, working, truth, strict=True):
            assert_as_exact_as(one, actual[:, rows], true[:, rows])


@each_implementation
def test_a_frame_that_overflowed_stays_out_of_the_other_sums(
    implementation: Implementation,
) -> None:
    shape = (1, 3, 2, 16)
    args = arguments(shape, torch.float32, (True, True), implementation.device)
    args[5] = torch.tensor([[True, False, True]], device=implementation.device)
    dsum, dnormed = random_grads(shape)
    dsum[0, 1] = dnormed[0, 1] = torch.inf
    with implementation.activate():
        _, _, *drows = gradients(call(args), args, (dsum, dnormed))
    assert all(row.isfinite().all() for row in drows[:3])
    assert not any(row.isfinite().any() for row in drows[3:])


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    shape = (1, 2, 5, 32)
    args = arguments(shape, torch.bfloat16, (True, True), implementation.device)
    runs = []
    for _ in range(2):
        with implementation.activate():
            results = call(args)
            runs.append((*results, *gradients(results, args, random_grads(shape))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_implementation
def test_modulations_are_cast_to_the_dtype_of_x(implementation: Implementation) -> None:
    args = arguments((2, 4, 32), torch.float32, (True, False), implementation.device)
    args[:2] = (a.detach().bfloat16() for a in args[:2])
    with implementation.activate():
        results = call(args)
        expected = call([*args[:2], *(a.bfloat16() for a in args[2:5]), *args[5:]])
        dgate, dshift, dscale = gradients(results, args, random_grads((2, 4, 32)))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert [r.dtype for r in results] == [torch.bfloat16] * 2
    assert [r.dtype for r in (dgate, dshift, dscale)] == [torch.float32] * 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[-1:], ids=str)
@each_kind
def test_opcheck(implementation: Implementation, kind: tuple[bool, bool]) -> None:
    if implementation.device != "cpu":
        pytest.skip("the ops are checked on the CPU")
    args = [
        a.detach() if isinstance(a, Tensor) else a
        for a in arguments((1, 2, 2, 8), torch.float32, kind)
    ]
    x, y, gate, _, scale, select, gate0, _, scale0, eps = args
    kept = None if gate is None else y.bfloat16()
    with through_dispatcher():
        torch.library.opcheck(op._forward.overload, tuple(args))
        for dsum in (x, None):
            saved = (dsum, x, x, kept, gate, scale, select, gate0, scale0, eps)
            torch.library.opcheck(op._backward.overload, saved)


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_compiles_without_graph_break(mode: str) -> None:
    shape = (2, 3, 4, 32)
    args = arguments(shape, torch.float32, (True, True))
    eager = gradients(call(args), args, random_grads(shape))
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    with through_dispatcher(), testing._mode(mode):
        compiled = torch.compile(lambda *a: call(list(a)), fullgraph=True, backend="aot_eager")
        results = compiled(*args)
        for one, other in zip(results, op.reference(*args), strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(gradients(results, args, random_grads(shape)), eager)
        with torch.no_grad():
            torch.compile(lambda *a: call(list(a)), fullgraph=True, backend=backend)(*args)
    kept = mode == "require" or op._forward.kernel("cpu") == "C++"
    assert ("residual_layernorm_modulate_forward" in graphs[0]) is kept


def test_a_required_kernel_that_cannot_run_raises() -> None:
    args = arguments((1, 2, 8), torch.float64, (True, False))
    assert call(args)[1].dtype == torch.float64
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
        ({"shift": torch.zeros(2, 9)}, "shift must be"),
        ({"scale0": torch.zeros(3, 8)}, r"scale0 must be .* got torch.float32 \[3, 8\]"),
        ({"scale": torch.zeros(2, 8, device="meta")}, "scale must be .* on cpu"),
        ({"gate": None}, "gate0 comes with gate"),
        ({"gate0": None}, "come together"),
        ({"select": None}, "come together"),
        ({"shift0": None}, "come together"),
        ({"select": torch.ones(2, 3)}, "select must be bool"),
        ({"select": torch.ones(2, 4, dtype=torch.bool)}, "4 frames, which does not fit"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Tensor | None], message: str) -> None:
    row = torch.zeros(2, 8)
    good = dict.fromkeys(("gate", "shift", "scale", "gate0", "shift0", "scale0"), row)
    good |= {
        "x": torch.zeros(2, 6, 8),
        "y": torch.zeros(2, 6, 8),
        "select": torch.ones(2, 3, dtype=torch.bool),
    }
    residual_layernorm_modulate(**good)
    residual_layernorm_modulate(**(good | {"gate": None, "gate0": None}))
    with pytest.raises(ValueError, match=message):
        residual_layernorm_modulate(**(good | change))


@each_kind
@each_implementation
def test_int64_offsets(
    implementation: Implementation, kind: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 2, 3, 96)
    args = arguments(shape, torch.float32, kind, implementation.device)
    runs = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
        with implementation.activate():
            results = call(args)
            runs.append((*results, *gradients(results, args, random_grads(shape))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("channels", [1, 16, 512, 1000, 1152, 2048, 5000, 40000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_launch_parameters_are_powers_of_two(channels: int, itemsize: int) -> None:
    config = kernels.Config.heuristic(channels, itemsize)
    for warps in (config.forward_warps, config.backward_warps):
        assert 1 <= warps <= 32
        assert warps & (warps - 1) == 0


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")
