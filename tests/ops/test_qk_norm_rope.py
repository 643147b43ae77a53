"""Test `qk_norm_rope`: every implementation against the reference in float64."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora import testing
from opensora.functional import qk_norm_rope
from opensora.kernels import qk_norm_rope as kernels
from opensora.nn import RMSNorm, RotaryEmbedding, rotate
from opensora.ops import qk_norm_rope as op
from opensora.testing import Implementation, assert_as_exact_as, double, randn

# [..., 3, H, D] and the axis of positions: STDiT3-XL's head over frames and over patches, the tiny
# model's, blocks of heads with a ragged end, widths of other models, a row of one position.
SHAPES = [
    ((1, 2, 2, 3, 16, 72), -5),
    ((1, 5, 3, 16, 72), -4),
    ((1, 2, 1, 3, 4, 32), -4),
    ((2, 1, 2, 3, 5, 64), -6),
    ((2, 3, 17, 96), -4),
    ((1, 2, 3, 9, 128), -4),
    ((1, 1, 2, 3, 1, 256), -5),
    ((1, 3, 3, 3, 10), -4),
]
DTYPES = [torch.float32, torch.bfloat16]
MODES = ["both", "legacy", "norm", "rotary"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


dispatched = partial(testing.dispatched, op._forward, op._inplace, op._backward)

IMPLEMENTATIONS = testing.implementations()
if INTERPRETED:  # interpreted Triton takes what CUDA would
    op.DTYPES["cpu"] = op.DTYPES["cuda"]
# Schema, fakes and autograd are tested on the C++ kernels, or on the references without a compiler.
through_dispatcher = testing.require if op._forward.kernel("cpu") == "C++" else dispatched
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
each_mode = pytest.mark.parametrize("mode", MODES)


def arguments(
    shape: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    mode: str = "both",
    device: str = "cpu",
    wide: torch.dtype | None = None,
) -> list[Any]:
    """Return the arguments of the op's reference; cos and sin are no angle's."""
    width, positions = shape[-1], shape[dim]
    qkv = (randn(*shape, seed=1) * 2 + 0.5).to(device, dtype).requires_grad_()
    q_weight, k_weight, cos, sin = None, None, None, None
    if mode != "rotary":
        q_weight, k_weight = (
            (randn(width, seed=s) * 0.3 + 1).to(device, wide or dtype).requires_grad_()
            for s in (2, 3)
        )
    if mode != "norm":
        half = [randn(positions, width // 2, seed=s).to(device, wide or dtype) for s in (4, 5)]
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in half)
    return [qkv, q_weight, k_weight, cos, sin, dim, mode == "legacy", 1e-6]


def call(args: list[Any], **options: Any) -> Tensor:
    qkv, q_weight, k_weight, cos, sin, dim, legacy, eps = args
    rotary = None if cos is None else (cos, sin)
    return qk_norm_rope(
        qkv, q_weight, k_weight, rotary, position_dim=dim, legacy=legacy, eps=eps, **options
    )


def gradients(y: Tensor, args: list[Any], grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(y, inputs, grad.to(y.device, y.dtype))


def assert_forward(args: list[Any], y: Tensor) -> None:
    """Compare with float64; q, k and v apart, because the tolerance follows the largest error."""
    working, truth = op.reference(*args), op.reference(*double(args))
    for part in range(3):
        assert_as_exact_as(*(t.select(-3, part) for t in (working, y, truth)))


def assert_backward(args: list[Any], grad: Tensor, actual: tuple[Tensor, ...]) -> None:
    working = gradients(op.reference(*args), args, grad)
    exact = double(args)
    truth = gradients(op.reference(*exact), exact, grad)
    for part in range(3):
        assert_as_exact_as(*(t[0].select(-3, part) for t in (working, actual, truth)))
    for one, other, true in zip(working[1:], actual[1:], truth[1:], strict=True):
        assert_as_exact_as(one, other, true)


@each_shape
@each_dtype
@each_implementation
def test_forward_matches_reference(
    implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...], dim: int
) -> None:
    args = arguments(shape, dim, dtype, "both", implementation.device)
    with implementation.activate(), torch.no_grad():
        y = call(args)
    assert_forward(args, y)
    assert torch.equal(y.select(-3, 2), args[0].select(-3, 2))


@each_shape
@each_dtype
@each_implementation
def test_backward_matches_reference(
    implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...], dim: int
) -> None:
    args = arguments(shape, dim, dtype, "both", implementation.device)
    grad = randn(*shape, seed=6).to(dtype)
    with implementation.activate():
        actual = gradients(call(args), args, grad)
    assert_backward(args, grad, actual)


@each_dtype
@each_mode
@each_implementation
def test_norm_and_rotation_are_options(
    implementation: Implementation, mode: str, dtype: torch.dtype
) -> None:
    shape = (2, 2, 1, 3, 3, 40)
    args = arguments(shape, -5, dtype, mode, implementation.device)
    grad = randn(*shape, seed=6).to(dtype)
    with implementation.activate():
        y = call(args)
        actual = gradients(y, args, grad)
    assert_forward(args, y)
    assert_backward(args, grad, actual)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        (one, dtype)
        for one in IMPLEMENTATIONS
        for dtype in (torch.bfloat16, torch.float16)
        if dtype == torch.bfloat16 or not one.name.startswith("C++")
    ],
    ids=str,
)
@each_mode
def test_weights_and_table_may_be_wider(
    implementation: Implementation, mode: str, dtype: torch.dtype
) -> None:
    shape = (1, 3, 3, 2, 72)
    args = arguments(shape, -4, dtype, mode, implementation.device, wide=torch.float32)
    grad = randn(*shape, seed=6).to(dtype)
    with implementation.activate():
        y = call(args)
        actual = gradients(y, args, grad)
    assert_forward(args, y)
    assert_backward(args, grad, actual)
    assert all(t.dtype == torch.float32 for t in actual[1:])


@each_implementation
def test_gradients_of_weights_add_up_over_many_tokens(implementation: Implementation) -> None:
    shape = (1, 33, 3, 1, 8)  # a program takes 32 tokens
    args = arguments(shape, -4, torch.float32, "both", implementation.device)
    grad = randn(*shape, seed=6)
    with implementation.activate():
        assert_backward(args, grad, gradients(call(args), args, grad))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_equals_the_modules_bit_for_bit(dtype: torch.dtype, legacy: bool) -> None:
    qkv = randn(2, 5, 3, 4, 72, dtype=dtype, seed=1)
    norms = [RMSNorm(72).to(dtype) for _ in range(2)]
    for seed, norm in enumerate(norms):
        norm.weight.data = randn(72, dtype=dtype, seed=seed)
    table = RotaryEmbedding(72).to(dtype).table(5)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # as in Attention
    if legacy:
        q, k = norms[0](rotate(q, table)), norms[1](rotate(k, table))
    else:
        q, k = rotate(norms[0](q), table), rotate(norms[1](k), table)
    expected = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4)
    with testing.reference():
        y = qk_norm_rope(qkv, norms[0].weight, norms[1].weight, table, legacy=legacy)
    assert torch.equal(y, expected)


@each_mode
def test_reference_backward_equals_autograd(mode: str) -> None:
    args = double(arguments((2, 3, 2, 3, 2, 6), -5, torch.float32, mode))
    grad = randn(2, 3, 2, 3, 2, 6, dtype=torch.float64, seed=6)
    dqkv, *dweights = gradients(op.reference(*args), args, grad)
    mine, both = op.reference_backward(grad, *args)
    torch.testing.assert_close(mine, dqkv)
    if dweights:
        torch.testing.assert_close(both, torch.stack(dweights))
    else:
        assert both.shape == (2, 0)


@each_mode
def test_gradcheck(mode: str) -> None:
    args = double(arguments((1, 3, 2, 3, 2, 4), -5, torch.float32, mode))
    assert torch.autograd.gradcheck(lambda *a: call(list(a)), args)


@each_implementation
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 4),
    patches=st.integers(1, 4),
    heads=st.integers(1, 19),
    pairs=st.integers(1, 70),
    dim=st.integers(-6, -4),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    batch: int,
    frames: int,
    patches: int,
    heads: int,
    pairs: int,
    dim: int,
    mode: str,
    dtype: torch.dtype,
) -> None:
    shape = (batch, frames, patches, 3, heads, 2 * pairs)
    # The largest error of the reference, which the tolerance follows, needs values to show itself.
    assume(torch.Size(shape).numel() >= 256)
    args = arguments(shape, dim, dtype, mode, implementation.device)
    grad = randn(*shape, seed=6).to(dtype)
    with implementation.activate():
        y = call(args)
        actual = gradients(y, args, grad)
    assert_forward(args, y)
    assert_backward(args, grad, actual)


@each_implementation
def test_positions_are_those_of_the_axis(implementation: Implementation) -> None:
    args = arguments((1, 3, 2, 3, 2, 8), -5, torch.float32, "both", implementation.device)
    with implementation.activate(), torch.no_grad():
        y = call(args)
        moved = [args[0].transpose(1, 2).contiguous(), *args[1:5], -4, *args[6:]]
        assert torch.equal(call(moved).transpose(1, 2), y)
        one = [args[0][:, 1], *args[1:3], args[3][1:2].expand(2, 8), args[4][1:2].expand(2, 8), -4]
        assert torch.equal(call([*one, *args[6:]]), y[:, 1])


@each_implementation
def test_an_odd_width_may_be_normalised(implementation: Implementation) -> None:
    args = arguments((2, 3, 3, 2, 9), -4, torch.float32, "norm", implementation.device)
    with implementation.activate(), torch.no_grad():
        assert_forward(args, call(args))


@each_mode
@each_implementation
def test_inplace_writes_into_qkv(implementation: Implementation, mode: str) -> None:
    for dtype in DTYPES:
        args = arguments((1, 2, 2, 3, 5, 72), -5, dtype, mode, implementation.device)
        with implementation.activate(), torch.no_grad():
            expected = call(args)
            for dense in (True, False):
                qkv = args[0].detach().clone()
                if not dense:
                    qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
                version = qkv._version
                y = call([qkv, *args[1:]], inplace=True)
                assert y is qkv
                assert torch.equal(y, expected)
                assert qkv._version > version


def test_inplace_refuses_to_lose_gradients() -> None:
    args = arguments((1, 2, 3, 2, 8), -4, torch.float32)
    with pytest.raises(ValueError, match=r"inplace needs torch.no_grad\(\)"):
        call(args, inplace=True)
    args[0] = args[0].detach()  # the weights still ask
    with pytest.raises(ValueError, match=r"inplace needs torch.no_grad\(\)"):
        call(args, inplace=True)


@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    args = arguments((1, 3, 2, 3, 4, 24), -5, torch.float32, "both", implementation.device)
    wide = randn(1, 2, 3, 3, 4, 48, device=implementation.device, seed=7)
    strided = [wide.transpose(1, 2)[..., ::2], *args[1:]]
    strided[1] = randn(48, device=implementation.device, seed=8)[::2].requires_grad_()
    strided[3] = strided[3].T.contiguous().T
    strided[0].requires_grad_()
    dense = [a.contiguous() if isinstance(a, Tensor) else a for a in strided]
    grad = randn(1, 2, 3, 3, 4, 24, seed=6).transpose(1, 2)
    with implementation.activate():
        y, expected = call(strided), call(dense)
        results = gradients(y, strided[:3], grad)
        others = torch.autograd.grad(expected, strided[:3], grad.contiguous().to(y.device))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    for one, other in zip(results, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((0, 3, 3, 2, 8), -4), ((2, 0, 3, 2, 8), -4), ((2, 3, 0, 3, 2, 8), -5), ((2, 3, 3, 0, 8), -4)],
    ids=str,
)
@each_mode
@each_implementation
def test_empty_batch(
    implementation: Implementation, mode: str, shape: tuple[int, ...], dim: int
) -> None:
    args = arguments(shape, dim, torch.float32, mode, implementation.device)
    with implementation.activate():
        y = call(args)
        dqkv, *dweights = gradients(y, args, torch.ones(shape))
        with torch.no_grad():
            assert call(args, inplace=True) is args[0]
    assert y.shape == dqkv.shape == shape
    assert all(torch.equal(t, torch.zeros_like(t)) for t in dweights)


@each_dtype
@each_implementation
def test_extreme_values(implementation: Implementation, dtype: torch.dtype) -> None:
    args = arguments((1, 6, 3, 2, 40), -4, dtype, "both", implementation.device)
    qkv = args[0].detach().clone()
    qkv[0, 0] = 0.0
    qkv[0, 1] *= 1e-3
    qkv[0, 2] *= 1e15
    qkv[0, 3, :, 0, 5] = torch.nan
    qkv[0, 4] *= 1e-20
    args[0] = qkv
    with implementation.activate(), torch.no_grad():
        y = call(args)
    for row in range(6):  # row by row: the tolerance follows the largest error
        for head in range(2):
            one = [qkv[:, row : row + 1, :, head : head + 1], *args[1:3]]
            one += [t[row : row + 1] for t in args[3:5]] + args[5:]
            assert_forward(one, y[:, row : row + 1, :, head : head + 1])


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    args = arguments((1, 34, 3, 3, 32), -4, torch.bfloat16, "both", implementation.device)
    grad = randn(1, 34, 3, 3, 32, dtype=torch.bfloat16, seed=6)
    runs = []
    for _ in range(3):
        with implementation.activate():
            y = call(args)
            runs.append((y, *gradients(y, args, grad)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_opcheck() -> None:
    for mode in ("both", "rotary"):
        args = [
            a.detach() if isinstance(a, Tensor) else a
            for a in arguments((2, 3, 2, 3, 2, 8), -5, torch.float32, mode)
        ]
        with through_dispatcher():
            torch.library.opcheck(op._forward.overload, tuple(args))
            torch.library.opcheck(op._inplace.overload, tuple(args))
            torch.library.opcheck(op._backward.overload, (args[0], *args))


@pytest.mark.parametrize("kernels_mode", ["auto", "require"])
def test_compiles_without_graph_break(kernels_mode: str) -> None:
    args = arguments((2, 3, 2, 3, 2, 8), -5, torch.float32)
    grad = randn(2, 3, 2, 3, 2, 8, seed=6)
    eager = gradients(call(args), args, grad)
    with through_dispatcher(), testing._mode(kernels_mode):
        compiled = torch.compile(lambda *a: call(list(a)), fullgraph=True, backend="aot_eager")
        y = compiled(*args)
        torch.testing.assert_close(y, call(args))
        torch.testing.assert_close(gradients(y, args, grad), eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(3, 2, 8)}, r"qkv must be float \[..., N, 3, H, D\]"),
        ({"qkv": torch.zeros(2, 5, 4, 2, 8)}, "qkv must be float"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 8, dtype=torch.int64)}, "qkv must be float"),
        ({"position_dim": -3}, r"position_dim must be in \[-5, -4\], got -3"),
        ({"position_dim": -6}, "position_dim must be"),
        ({"position_dim": 1}, "position_dim must be"),
        ({"position_dim": -5}, r"rotary's cos must be \[N, D\] = \[2, 8\]"),
        ({"q_weight": None}, "come together"),
        ({"k_weight": None}, "come together"),
        (
            {"q_weight": torch.ones(9)},
            r"q_weight must be \[D = 8\] on cpu, got torch.float32 \[9\]",
        ),
        ({"k_weight": torch.ones(1, 8)}, "k_weight must be"),
        ({"k_weight": torch.ones(8, device="meta")}, "k_weight must be .* on cpu"),
        ({"k_weight": torch.ones(8).double()}, "must share a dtype"),
        ({"rotary": (torch.zeros(4, 8), torch.zeros(5, 8))}, "rotary's cos must be"),
        ({"rotary": (torch.zeros(5, 8), torch.zeros(5, 4))}, "rotary's sin must be"),
        ({"rotary": (torch.zeros(5, 8).requires_grad_(), torch.zeros(5, 8))}, "gets no gradient"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 7), "q_weight": None, "k_weight": None}, "must be even"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Any], message: str) -> None:
    good = {
        "qkv": torch.zeros(2, 5, 3, 2, 8),
        "q_weight": torch.ones(8),
        "k_weight": torch.ones(8),
        "rotary": (torch.zeros(5, 8), torch.zeros(5, 8)),
        "position_dim": -4,
    }
    qk_norm_rope(**good)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**(good | change))


@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments((2, 2, 1, 3, 3, 24), -5, torch.float32, "both", implementation.device)
    grad = randn(2, 2, 1, 3, 3, 24, seed=6)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
        with implementation.activate():
            y = call(args)
            results.append((y, *gradients(y, args, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")


NATIVE = [torch.float32, torch.bfloat16, torch.float16]
native = torch.ops.opensora.qk_norm_rope_forward.native
native_inplace = torch.ops.opensora.qk_norm_rope_inplace.native


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("mode", [*MODES, "neither"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((1, 5, 3, 16, 72), -4),
        ((2, 2, 3, 3, 5, 72), -5),
        ((2, 3, 7, 3, 1, 64), -6),
        ((1, 40, 3, 16, 64), -4),
    ],
    ids=str,
)
def test_native_matches_reference(
    native_device: str, shape: tuple[int, ...], dim: int, mode: str, dtype: torch.dtype
) -> None:
    args = arguments(shape, dim, dtype, "norm" if mode == "neither" else mode, native_device)
    args[0] = args[0].detach()
    if mode == "neither":
        args[1:3] = None, None
    elif shape[-1] == 64 and mode != "norm":
        args[3:5] = (t.float() for t in args[3:5])
    y = native(*args)
    working = op.reference(*args).to(dtype)
    for part in range(3):
        truth = op.reference(*double(args)).select(-3, part)
        assert_as_exact_as(working.select(-3, part), y.select(-3, part), truth)
    assert torch.equal(y.select(-3, 2), args[0].select(-3, 2))
    native_inplace(*args)
    assert torch.equal(args[0], y)


def test_native_takes_nothing_it_would_read_wrong(native_device: str) -> None:
    args = arguments((1, 5, 3, 16, 72), -4, torch.bfloat16, "both", native_device, torch.float32)
    wrong = {
        0: [args[0][..., :40].contiguous(), args[0].double(), args[0].transpose(1, 3)],
        1: [None, args[1][:40], args[1].bfloat16()],
        3: [None, args[3].bfloat16(), args[3][:2]],
        5: [-3],
    }
    shifted = torch.empty(args[0].numel() + 1, dtype=torch.bfloat16, device=native_device)[1:]
    wrong[0].append(shifted.view(args[0].shape))
    for i, values in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError, match=r"must|come together"):
                native(*args[:i], value, *args[i + 1 :])
    empty = args[0].detach()[:, :0]
    assert native(empty, *args[1:3], *(t[:0] for t in args[3:5]), *args[5:]).shape == empty.shape
